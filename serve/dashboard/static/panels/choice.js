// Which precision? An answer for each thing one may want, then speed, bytes and quality in numbers and with their fronts.

import { adviceOn } from "../advice.js";
import { FrontChart } from "../charts.js";
import { el, keyed, setAttribute, setText, show } from "../dom.js";
import { bytes, count, duration, factor, number, percent } from "../format.js";
import { markOf, seriesClass } from "../palette.js";
import { mean, observations } from "../prometheus.js";
import { panel } from "./panel.js";

export function choicePanel() {
  const speed = new FrontChart({
    title: "Speed against bytes",
    note: "up and left is better",
    height: 250,
    xFormat: (v) => bytes(v, 2),
    yFormat: (v) => number(v),
    xLabel: "stored weights; dashed: beaten by none",
    yLabel: "tokens/s of one answer",
  });
  const quality = new FrontChart({
    title: "Quality against bytes",
    note: "down and left is better",
    height: 250,
    xFormat: (v) => bytes(v, 2),
    yFormat: (v) => number(v, 2),
    xLabel: "stored weights; dashed: beaten by none",
    yLabel: "KL, nats per token",
    lowerIsBetter: true,
  });
  const head = el("tr", {}, ["Variant", "Agreement", "Speed", "Bytes", "16-bit saving"].map((t) => el("th", { scope: "col" }, t)));
  const body = el("tbody");
  const table = el("table", { class: "choice compared" }, el("caption"), el("thead", {}, head), body);
  const advice = el("ul", { class: "advice" });
  const notes = el("ul", { class: "lines" });

  function update(view) {
    const points = pointsOf(view.variants);
    const timed = points.filter((p) => Number.isFinite(p.speed));
    const scored = points.filter((p) => Number.isFinite(p.drift));
    const judged = scored.length ? points.filter((p) => Number.isFinite(p.drift) || p.variant.name === view.reference) : [];
    const reference = points.find((p) => p.variant.name === view.reference);
    tell(adviceOn(points, reference));
    show(speed.node, timed.length > 0);
    show(quality.node, judged.length > 0);
    if (timed.length) speed.plot(timed.map(({ variant, size, speed: y }) => ({ variant, x: size, y })));
    if (judged.length) quality.plot(judged.map(({ variant, size, drift }) => ({ variant, x: size, y: drift || 0 })));
    table.classList.toggle("unmeasured", judged.length === 0);
    setText(table.caption, reference ? `Held against ${view.reference}` : "");
    keyed(body, points, (p) => p.variant.name, makeRow, (row, p) => updateRow(row, p, reference));
  }

  function tell({ answers, remarks }) {
    keyed(advice, answers, (a) => a.want, () => el("li", {}, el("span", { class: "want" }), el("span", { class: "names" }), el("span", { class: "why" })), (node, a) => {
      const [want, names, why] = node.children;
      setText(want, a.want);
      keyed(names, a.points, (p) => p.variant.name, makeName, () => {});
      setText(why, a.why);
    });
    keyed(notes, remarks, (remark) => remark, () => el("li"), setText);
  }

  const lead = "What matters most to you, who is best at it, and what that costs. Speed is at the load each carried: with little, tokens are quick.";
  return panel(
    { id: "choice", title: "Which precision", lead, update, available: (view) => pointsOf(view.variants).length > 0 },
    advice,
    notes,
    el("div", { class: "split" }, el("div", { class: "charts" }, speed.node, quality.node), el("div", { class: "wide" }, table)),
  );
}

/** What can be compared: the ready variants, with one answer's tokens per second as the exact mean gap gives it. */
function pointsOf(variants) {
  const known = variants.filter((v) => v.state === "ready" && Number.isFinite(v.storedBytes));
  return known.map((variant) => ({
    variant,
    size: variant.storedBytes,
    speed: 1 / mean(variant.stats.itl),
    gap: mean(variant.stats.itl),
    gaps: observations(variant.stats.itl),
    drift: variant.stats.drift.meanNats,
    agreement: variant.stats.drift.agreement,
    scored: variant.stats.drift.tokens,
    guard: variant.driftGuard,
  }));
}

function makeName({ variant }) {
  return el("span", { class: `name ${seriesClass(variant)}` }, `${markOf(variant)} ${variant.name}`);
}

function makeRow(point) {
  const cells = [0, 1, 2, 3].map(() => el("td", {}, el("span", { class: "main" }), el("span", { class: "second" })));
  return el("tr", {}, el("th", { scope: "row" }, makeName(point)), cells);
}

function updateRow(row, point, reference) {
  const { variant, size, speed, gap, gaps, drift, agreement } = point;
  const isReference = point === reference;
  const texts = [
    isReference ? ["reference", ""] : [percent(agreement), Number.isFinite(drift) ? `KL ${number(drift, 2)}` : "not measured"],
    [factor(speed / reference?.speed), `${duration(gap, 2)} a token`, `${count(gaps)} gaps between tokens were timed`],
    [factor(size / reference?.size), bytes(size)],
    [percent(1 - 1 / variant.compressionRatio), `${number(variant.bitsPerWeight)} bits`],
  ];
  texts.forEach(([main, second, title = null], index) => {
    const [first, below] = row.children[index + 1].children;
    setAttribute(row.children[index + 1], "title", title);
    setText(first, main);
    setText(below, second);
  });
}
