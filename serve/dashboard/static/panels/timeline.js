// The last quarter of an hour: throughput, latencies and queues as lines, since this page was opened.

import { TimeChart } from "../charts.js";
import { el } from "../dom.js";
import { count, duration, number, percent } from "../format.js";
import { quantile } from "../prometheus.js";
import { Recorder } from "../recorder.js";
import { panel } from "./panel.js";

const SHORT_S = 5;
const LONG_S = 30;

const LINES = [
  ["Tokens per second", "", number, SHORT_S, (stats) => stats.tokensPerSecond],
  ["In flight", "running and waiting", count, SHORT_S, (_, variant) => variant.running + variant.waiting],
  ["Errors", "share of requests, over half a minute", (v) => percent(v, 2), LONG_S, (stats) => stats.errorRatio],
  ["First token, p90", "over half a minute", (v) => duration(v, 2), LONG_S, (stats) => quantile(stats.ttft, 0.9)],
  ["Next token, p90", "over half a minute", (v) => duration(v, 2), LONG_S, (stats) => quantile(stats.itl, 0.9)],
  ["Whole answer, p90", "over half a minute", (v) => duration(v, 2), LONG_S, (stats) => quantile(stats.e2e, 0.9)],
];

export function timelinePanel() {
  const lines = LINES.map(([title, note, format, seconds, valueOf]) => {
    return { chart: new TimeChart({ title, note, format, whole: format === count }), recorder: new Recorder(seconds, valueOf), format };
  });
  const update = (view) => {
    const ready = view.variants.filter((variant) => variant.state === "ready");
    for (const { chart, recorder, format } of lines) {
      recorder.record(view, ready);
      chart.draw(ready, recorder.data(ready), recorder.summary(ready, format));
    }
  };
  const nodes = lines.map(({ chart }) => chart.node);
  return panel({ id: "time", title: "Over time", update }, el("div", { class: "grid" }, nodes));
}
