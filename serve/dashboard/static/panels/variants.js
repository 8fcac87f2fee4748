// The table: one row per variant, everything that is measured about it while it serves.

import { el, keyed, setAttribute, setText } from "../dom.js";
import { bytes, count, duration, number, percent } from "../format.js";
import { sum } from "../history.js";
import { markOf, seriesClass } from "../palette.js";
import { quantile } from "../prometheus.js";
import { panel } from "./panel.js";

/** Title, explanation, and what a cell says: a main text, and a second line where there is one. */
const COLUMNS = [
  ["Requests/s", "Answers that ended in the last 10 seconds", (v) => [number(v.now.requestsPerSecond)]],
  ["Tokens/s", "Tokens made in the last 10 seconds", (v) => [number(v.now.tokensPerSecond)]],
  ["First token", "Received to first token (TTFT): median, then 90th and 99th percentile", (v) => quantiles(v.stats.ttft)],
  ["Next token", "Gap between two tokens (ITL): median, then 90th and 99th percentile", (v) => quantiles(v.stats.itl)],
  ["Whole answer", "Received to last token (E2E): median, then 90th and 99th percentile", (v) => quantiles(v.stats.e2e)],
  ["In flight", "Sequences that the engine runs, and those that wait for it", inFlight],
  ["KV cache", "Used share of the KV blocks, of the fullest replica", (v) => [percent(v.kvUsage, 2)]],
  ["Errors", "Share of requests that failed", errors],
  ["Weights", "Stored bytes, scales and tables included; bits per weight of the compressed layers", weights],
];

export function variantsPanel() {
  const body = el("tbody");
  const titles = COLUMNS.map(([title, why]) => el("th", { scope: "col", title: why }, title));
  const head = el("thead", {}, el("tr", {}, el("th", { scope: "col" }, "Variant"), titles));
  const caption = el("caption", { class: "unseen" }, "Variants: speed, load, errors and size");
  const table = el("table", { class: "variants" }, caption, head, body);
  const update = ({ variants }) => {
    keyed(body, variants, (v) => `${v.name} ${v.state === "ready"}`, (v) => makeRow(v), updateRow);
  };
  return panel({ id: "variants", title: "Variants", update }, table);
}

function makeRow(variant) {
  const name = el("span", { class: `name ${seriesClass(variant)}` }, `${markOf(variant)} ${variant.name}`);
  const head = el("th", { scope: "row" }, name, el("span", { class: "second" }));
  if (variant.state !== "ready") {
    return el("tr", { class: "absent" }, head, el("td", { colspan: COLUMNS.length, class: "why" }));
  }
  const cells = COLUMNS.map(([title]) => {
    return el("td", { dataset: { title } }, el("span", { class: "main" }), el("span", { class: "second" }));
  });
  return el("tr", {}, head, cells);
}

function updateRow(row, variant) {
  const [head, ...cells] = row.children;
  setText(head.children[1], variant.state === "ready" ? variant.precision : `${variant.precision} · ${variant.state}`);
  if (variant.state !== "ready") return setText(cells[0], whyAbsent(variant));
  return COLUMNS.forEach(([, , say], index) => {
    const [main, second = "", title = null] = say(variant);
    setText(cells[index].children[0], main);
    setText(cells[index].children[1], second);
    setAttribute(cells[index], "title", title);
  });
}

function whyAbsent({ state, reason, stage, progress }) {
  if (state === "failed") return `It could not be loaded: ${reason ?? "no reason was given"}`;
  return stage ? `Loading: ${stage}${progress ? `, ${percent(progress, 2)}` : ""}` : "Loading";
}

function quantiles(histogram) {
  const [p50, p90, p99] = [0.5, 0.9, 0.99].map((q) => quantile(histogram, q));
  if (!Number.isFinite(p50)) return [duration(NaN)];
  return [duration(p50, 2), `${duration(p90, 2)} · ${duration(p99, 2)}`];
}

function inFlight({ running, waiting }) {
  return [count(running), waiting > 0 ? `${count(waiting)} waiting` : ""];
}

function errors({ stats }) {
  const failed = sum(stats.errors);
  const codes = Object.entries(stats.errors).filter(([, value]) => value > 0);
  const title = codes.map(([code, value]) => `${code}: ${count(value)}`).join(", ");
  return [percent(stats.errorRatio, 2), failed ? `${count(failed)} of ${count(stats.requests)}` : "", title || null];
}

function weights({ storedBytes, bitsPerWeight }) {
  return [bytes(storedBytes), `${number(bitsPerWeight)} bits`];
}
