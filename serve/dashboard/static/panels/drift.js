// Paired drift: how far each variant's served tokens lie from the reference's distribution. Shown once it is measured.

import { TimeChart } from "../charts.js";
import { el, keyed, setText } from "../dom.js";
import { count, number, percent } from "../format.js";
import { markOf, seriesClass } from "../palette.js";
import { observations, quantile } from "../prometheus.js";
import { Recorder } from "../recorder.js";
import { panel } from "./panel.js";

const COLUMNS = [
  ["KL mean, nats", (d) => number(d.meanNats, 3)],
  ["Guard", (d, guard) => against(d.meanNats, guard)],
  ["p50", (d) => number(quantile(d.histogram, 0.5), 2)],
  ["p99", (d) => number(quantile(d.histogram, 0.99), 2)],
  ["Same first choice", (d) => percent(d.agreement)],
  ["Tokens scored", (d) => count(d.tokens)],
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
  const table = el("table", { class: "choice" }, el("thead", {}, el("tr", {}, titles)), body);

  function update(view) {
    const scored = measured(view);
    recorder.record(view, scored);
    chart.draw(scored, recorder.data(scored), recorder.summary(scored, (v) => number(v, 2)));
    keyed(body, scored, (v) => v.name, makeRow, updateRow);
  }

  const lead = "Served tokens scored again on the reference variant, over the whole vocabulary.";
  return panel(
    { id: "drift", title: "Drift", lead, update, available: (view) => measured(view).length > 0 },
    el("div", { class: "split" }, chart.node, el("div", { class: "wide" }, table)),
  );
}

const measured = ({ variants }) => variants.filter((variant) => observations(variant.drift) > 0);

function makeRow(variant) {
  const name = el("span", { class: `name ${seriesClass(variant)}` }, `${markOf(variant)} ${variant.name}`);
  return el("tr", {}, el("th", { scope: "row" }, name), COLUMNS.map(() => el("td")));
}

function updateRow(row, variant) {
  const { driftGuard: guard, stats } = variant;
  COLUMNS.forEach(([, say], index) => setText(row.children[index + 1], say(stats.drift, guard)));
  row.classList.toggle("beyond", stats.drift.meanNats > guard);
}

function against(meanNats, guard) {
  if (!Number.isFinite(meanNats)) return "no data";
  if (!(guard > 0)) return "none";
  return `${meanNats > guard ? "beyond" : "within"} ${number(guard, 2)}`;
}
