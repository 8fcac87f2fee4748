// What the panels show: the newest look at the server with what happened in the chosen window.

import { between, sum } from "./history.js";

const NOW_S = 10;
const SETTLED_S = 15;

/**
 * `windowSeconds` 0 is the whole run of the server. The whole run also stands in while the page is too young for the
 * window, or nothing was asked in it; `view.span` says which it is. `recent(seconds)` looks at any other window.
 */
export function viewOf(history, windowSeconds, refusal) {
  const snapshot = history.latest;
  const recent = statistics(snapshot, history.before(windowSeconds));
  const young = history.seconds < Math.min(windowSeconds, SETTLED_S);
  const quiet = sum(requestsOf(recent)) === 0;
  const whole = !windowSeconds || young || quiet;
  const chosen = whole ? statistics(snapshot, null) : recent;
  const now = statistics(snapshot, history.before(NOW_S));
  const answered = sum(requestsOf(chosen));
  return {
    snapshot,
    refusal,
    reference: referenceOf(snapshot),
    span: { whole, seconds: Math.min(windowSeconds, history.seconds), quiet: quiet && windowSeconds > 0 && !young },
    answered,
    recent: (seconds) => statistics(snapshot, history.before(seconds)),
    variants: snapshot.variants.map((variant) => ({
      ...variant,
      stats: chosen[variant.name],
      now: now[variant.name],
      answeredShare: answered ? chosen[variant.name].requests / answered : NaN,
      storedBytes: variant.memory.weights + (variant.memory.quantization ?? 0),
      loadTotalSeconds: Object.keys(variant.loadSeconds).length ? sum(variant.loadSeconds) : NaN,
    })),
  };
}

function statistics(snapshot, before) {
  return Object.fromEntries(snapshot.variants.map(({ name }) => [name, between(before, snapshot, name)]));
}

const requestsOf = (stats) => Object.fromEntries(Object.entries(stats).map(([name, { requests }]) => [name, requests]));

/**
 * The variant that the others are held against: the one that has no guard while others have; where there are none the
 * stable one where we may know it, else the one of most bits.
 */
function referenceOf(snapshot) {
  const ready = snapshot.variants.filter((variant) => variant.state === "ready");
  const unguarded = snapshot.variants.filter((variant) => !(variant.driftGuard > 0));
  const measured = unguarded.length === 1 ? ready.find((variant) => variant === unguarded[0]) : null;
  const stable = ready.find((variant) => variant.name === snapshot.traffic?.stable);
  const widest = ready.toSorted((a, b) => (b.bitsPerWeight || 0) - (a.bitsPerWeight || 0))[0];
  return (measured ?? stable ?? widest)?.name ?? null;
}
