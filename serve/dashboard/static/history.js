// What was seen since the page was opened, bounded, and what happened between two moments of it.

import { difference, mean, observations } from "./prometheus.js";

const KEPT = 1000;

export const sum = (byLabel) => Object.values(byLabel).reduce((total, value) => total + value, 0);

export class History {
  #snapshots = [];

  get latest() {
    return this.#snapshots.at(-1) ?? null;
  }

  get seconds() {
    return this.#snapshots.length ? (this.latest.atMs - this.#snapshots[0].atMs) / 1000 : 0;
  }

  /** A server that started anew counts from zero: then what was seen before is of no use. */
  push(snapshot) {
    if (this.latest && restarted(this.latest, snapshot)) this.#snapshots = [];
    this.#snapshots.push(snapshot);
    if (this.#snapshots.length > KEPT) this.#snapshots.shift();
  }

  /** The newest snapshot that is at least so old, or the oldest there is. */
  before(seconds) {
    const deadline = this.latest.atMs - seconds * 1000;
    return this.#snapshots.findLast((snapshot) => snapshot.atMs <= deadline) ?? this.#snapshots[0];
  }
}

function restarted(before, now) {
  return now.variants.some((variant) => {
    const earlier = variantIn(before, variant.name);
    return earlier && variant.generationTokens < earlier.generationTokens;
  });
}

export const variantIn = (snapshot, name) => snapshot.variants.find((variant) => variant.name === name);

/** What happened to one variant from `before` to `now`; since the server started where `before` is null. */
export function between(before, now, name) {
  const later = variantIn(now, name);
  const earlier = before ? variantIn(before, name) : null;
  const seconds = before ? (now.atMs - before.atMs) / 1000 : NaN;
  const errors = grown(later.errors, earlier?.errors);
  const finished = grown(later.finished, earlier?.finished);
  const tokens = later.generationTokens - (earlier?.generationTokens || 0);
  const requests = sum(finished) + sum(errors);
  return {
    seconds,
    requests,
    tokens,
    errors,
    requestsPerSecond: requests / seconds,
    tokensPerSecond: tokens / seconds,
    errorRatio: requests ? sum(errors) / requests : NaN,
    ttft: difference(later.ttft, earlier?.ttft),
    itl: difference(later.itl, earlier?.itl),
    e2e: difference(later.e2e, earlier?.e2e),
    drift: driftBetween(later, earlier),
  };
}

function grown(later, earlier = {}) {
  return Object.fromEntries(Object.entries(later).map(([key, value]) => [key, value - (earlier[key] ?? 0)]));
}

function driftBetween(later, earlier) {
  const histogram = difference(later.drift, earlier?.drift);
  const delta = (key) => later[key] - (earlier?.[key] || 0);
  const tokens = delta("driftTokens");
  return {
    histogram,
    tokens: tokens || observations(histogram),
    meanNats: mean(histogram),
    samples: grown(later.driftSamples, earlier?.driftSamples),
    agreement: delta("driftAgreements") / tokens,
  };
}
