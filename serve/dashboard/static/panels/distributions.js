// Whole latency distributions: the share of observations up to each bucket's edge.

import { DistributionChart } from "../charts.js";
import { el, show } from "../dom.js";
import { duration } from "../format.js";
import { observations, quantile } from "../prometheus.js";
import { panel } from "./panel.js";

const LATENCIES = [
  ["ttft", "First token", "received to first token"],
  ["itl", "Next token", "gap between two tokens"],
  ["e2e", "Whole answer", "received to last token"],
];

export function distributionPanel() {
  const charts = LATENCIES.map(([key, title, note]) => {
    return { key, chart: new DistributionChart({ title, note, format: (v) => duration(v, 2) }) };
  });
  const update = ({ variants }) => {
    for (const { key, chart } of charts) {
      const seen = variants.filter((variant) => observations(variant.stats[key]) > 0);
      show(chart.node, seen.length > 0);
      if (seen.length) chart.draw(seen, sharesOf(seen, key), summary(seen, key));
    }
  };
  const available = ({ variants }) => variants.some((variant) => observations(variant.stats.ttft) > 0);
  const lead = "Share of requests that were at most so slow. Percentiles in the table lie between these edges.";
  return panel(
    { id: "latency", title: "Latency", lead, update, available },
    el("div", { class: "grid thirds" }, charts.map(({ chart }) => chart.node)),
  );
}

/** Cut to the edges between which something happens. */
function sharesOf(variants, key) {
  const edges = variants[0].stats[key].edges.slice(0, -1);
  const shares = variants.map(({ stats }) => edges.map((_, i) => stats[key].counts[i] / observations(stats[key])));
  const first = Math.max(0, edges.findIndex((_, i) => shares.some((column) => column[i] > 0)) - 1);
  const full = edges.findIndex((_, i) => shares.every((column) => column[i] === 1));
  const last = full < 0 ? edges.length : full + 1;
  return [edges, ...shares].map((column) => column.slice(first, Math.max(last, first + 2)));
}

function summary(variants, key) {
  const say = ({ name, stats }) => `${name}: median ${duration(quantile(stats[key], 0.5))}, p99 ${duration(quantile(stats[key], 0.99))}`;
  return variants.map(say).join("; ");
}
