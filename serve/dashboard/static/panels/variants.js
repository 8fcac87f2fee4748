// The table: one row per variant, everything that is measured about it while it serves.

import { el, keyed, setAttribute, setText } from "../dom.js";
import { bytes, count, duration, number, percent } from "../format.js";
import { sum } from "../history.js";
import { markOf, seriesClass } from "../palette.js";
import { quantile } from "../prometheus.js";
import { panel } from "./panel.js";

/** Title, what it means, and what a cell says: a main text, and a second line where there is one. */
const COLUMNS = [
  ["Requests/s", "last 10 s", (v) => [number(v.now.requestsPerSecond)]],
  ["Tokens/s", "last 10 s", (v) => [number(v.now.tokensPerSecond)]],
  ["First token", "TTFT: p50, p90 · p99", (v) => quantiles(v.stats.ttft)],
  ["Next token", "ITL: p50, p90 · p99", (v) => quantiles(v.stats.itl)],
  ["Whole answer", "E2E: p50, p90 · p99", (v) => quantiles(v.stats.e2e)],
  ["In flight", "running", inFlight],
  ["KV cache", "of its blocks", (v) => [percent(v.kvUsage, 2)]],
  ["Errors", "of its requests", errors],
  ["Weights", "with scales", weights],
];

export function variantsPanel() {
  const body = el("tbody");
  const titles = COLUMNS.map(([title, what]) => el("th", { scope: "col" }, title, el("span", { class: "second" }, what)));
  const head = el("thead", {}, el("tr", {}, el("th", { scope: "col" }, "Variant"), titles));
  const caption = el("caption", { class: "unseen" }, "Variants: speed, load, errors and size");
  const table = el("table", { class: "variants" }, caption, head, body);
  const update = ({ variants }) => {
    keyed(body, variants, (v) => `${v.name} ${v.state}`, (v) => makeRow(v), updateRow);
  };
  return panel({ id: "variants", title: "Variants", update }, el("div", { class: "wide" }, table));
}

function makeRow(variant) {
  const name = el("span", { class: `name ${seriesClass(variant)}` }, `${markOf(variant)} ${variant.name}`);
  const head = el("th", { scope: "row" }, name, el("span", { class: "second" }));
  if (variant.state !== "ready") {
    return el("tr", { class: `absent ${variant.state}` }, head, el("td", { colspan: COLUMNS.length, class: "why" }));
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
