// Paired drift: how far each variant's served tokens lie from the reference's distribution. Shown once it is measured.

import { TimeChart } from "../charts.js";
import { el, keyed, setText } from "../dom.js";
import { count, number, percent } from "../format.js";
import { markOf, seriesClass } from "../palette.js";
import { observations, quantile } from "../prometheus.js";
import { Recorder } from "../recorder.js";
import { panel } from "./panel.js";

const NOT_SCORED = { shed: "shed to make way for users", no_data: "found no reader", unfinished: "unfinished", failed: "failed" };

const COLUMNS = [
  ["KL mean", (d) => number(d.meanNats, 3)],
  ["Guard", (d, guard, now) => (isBlind(now) ? "no data now" : against(d.meanNats, guard))],
  ["p50", (d) => number(quantile(d.histogram, 0.5), 2)],
  ["p99", (d) => number(quantile(d.histogram, 0.99), 2)],
  ["Agreement", (d) => percent(d.agreement)],
  ["Tokens", (d) => count(d.tokens)],
];

export function driftPanel() {
  const chart = new TimeChart({
    title: "KL, nats per token",
    note: "over the last minute; dotted: its guard",
    format: (v) => number(v, 2),
    limitOf: (variant) => variant.driftGuard,
  });
  const recorder = new Recorder(60, (stats) => stats.drift.meanNats);
  const titles = ["Variant", ...COLUMNS.map(([title]) => title)].map((title) => el("th", { scope: "col" }, title));
  const body = el("tbody");
  const table = el("table", { class: "choice scored", "aria-label": "Drift by variant" }, el("thead", {}, el("tr", {}, titles)), body);

  const losses = el("p", { class: "hint" });

  function update(view) {
    const scored = measured(view);
    recorder.record(view, scored);
    chart.draw(scored, recorder.data(scored), recorder.summary(scored, (v) => number(v, 2)));
    keyed(body, scored, (v) => v.name, makeRow, updateRow);
    setText(losses, lossesOf(scored));
  }

  const lead = "Served tokens scored again on the reference variant, over the whole vocabulary. Agreement: its first choice too.";
  return panel(
    { id: "drift", title: "Drift", lead, update, available: (view) => measured(view).length > 0 },
    el("div", { class: "split even" }, chart.node, el("div", { class: "wide" }, table, losses)),
  );
}

const measured = ({ variants }) => variants.filter((variant) => observations(variant.drift) > 0);

function makeRow(variant) {
  const name = el("span", { class: `name ${seriesClass(variant)}` }, `${markOf(variant)} ${variant.name}`);
  return el("tr", {}, el("th", { scope: "row" }, name), COLUMNS.map(() => el("td")));
}

function updateRow(row, variant) {
  const { driftGuard: guard, stats, now } = variant;
  COLUMNS.forEach(([, say], index) => setText(row.children[index + 1], say(stats.drift, guard, now.drift)));
  row.classList.toggle("beyond", stats.drift.meanNats > guard);
}

function against(meanNats, guard) {
  if (!Number.isFinite(meanNats)) return "no data";
  if (!(guard > 0)) return "none";
  return `${meanNats > guard ? "beyond" : "within"} ${number(guard, 2)}`;
}

/** Answers were drawn in the last seconds, and nobody was there to read them. */
const isBlind = ({ samples }) => samples.no_data > 0 && !samples.scored;

/** "nf4: 12 answers scored, 3 shed to make way for users". Told where any were not scored. */
function lossesOf(scored) {
  const told = scored.flatMap(({ name, stats: { drift } }) => {
    const lost = Object.entries(NOT_SCORED).filter(([result]) => drift.samples[result] > 0);
    if (!lost.length) return [];
    const parts = lost.map(([result, words]) => `${count(drift.samples[result])} ${words}`);
    return [`${name}: ${count(drift.samples.scored ?? 0)} answers scored, ${parts.join(", ")}`];
  });
  return told.length ? `${told.join("; ")}.` : "";
}
