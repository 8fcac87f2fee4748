// Which precision? Speed against bytes, and quality against bytes once the server measures it; each with its front.

import { FrontChart } from "../charts.js";
import { el, keyed, setText, show } from "../dom.js";
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
    xLabel: "stored weights",
    yLabel: "tokens/s of one answer",
  });
  const quality = new FrontChart({
    title: "Quality against bytes",
    note: "down and left is better",
    height: 250,
    xFormat: (v) => bytes(v, 2),
    yFormat: (v) => number(v, 2),
    xLabel: "stored weights",
    yLabel: "KL, nats per token",
    lowerIsBetter: true,
  });
  const head = el("tr", {}, ["Variant", "Speed", "Bytes", "16-bit saving", "KL"].map((t) => el("th", { scope: "col" }, t)));
  const body = el("tbody");
  const table = el("table", { class: "choice" }, el("caption"), el("thead", {}, head), body);
  const verdict = el("p", { class: "verdict" });

  function update(view) {
    const points = pointsOf(view.variants);
    const timed = points.filter((p) => Number.isFinite(p.speed));
    const scored = points.filter((p) => Number.isFinite(p.drift));
    const judged = scored.length ? points.filter((p) => Number.isFinite(p.drift) || p.variant.name === view.reference) : [];
    show(speed.node, timed.length > 0);
    show(quality.node, judged.length > 0);
    if (timed.length) speed.plot(timed.map(({ variant, size, speed: y }) => ({ variant, x: size, y })));
    if (judged.length) quality.plot(judged.map(({ variant, size, drift }) => ({ variant, x: size, y: drift || 0 })));
    const reference = points.find((p) => p.variant.name === view.reference);
    table.classList.toggle("unmeasured", judged.length === 0);
    setText(table.caption, reference ? `Held against ${view.reference}` : "");
    keyed(body, points, (p) => p.variant.name, makeRow, (row, p) => updateRow(row, p, reference));
    setText(verdict, `${verdictOf(timed)}${qualityOf(scored)}`);
  }

  const lead = "Speed depends on the load that each variant carried: with little traffic batches are small and tokens quick.";
  return panel(
    { id: "choice", title: "Which precision", lead, update, available: (view) => pointsOf(view.variants).length > 0 },
    el("div", { class: "split" }, el("div", { class: "charts" }, speed.node, quality.node), el("div", { class: "wide" }, verdict, table)),
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
  }));
}

function makeRow({ variant }) {
  const name = el("span", { class: `name ${seriesClass(variant)}` }, `${markOf(variant)} ${variant.name}`);
  const cells = [0, 1, 2, 3].map(() => el("td", {}, el("span", { class: "main" }), el("span", { class: "second" })));
  return el("tr", {}, el("th", { scope: "row" }, name), cells);
}

function updateRow(row, point, reference) {
  const { variant, size, speed, gap, gaps, drift } = point;
  const texts = [
    [factor(speed / reference?.speed), `${duration(gap)} a token, n ${count(gaps)}`],
    [factor(size / reference?.size), bytes(size)],
    [percent(1 - 1 / variant.compressionRatio), `${number(variant.bitsPerWeight)} bits a weight`],
    [number(drift, 2), Number.isFinite(drift) ? `${percent(variant.stats.drift.agreement)} same first choice` : "not measured"],
  ];
  texts.forEach(([main, second], index) => {
    const [first, below] = row.children[index + 1].children;
    setText(first, main);
    setText(below, second);
  });
}

const FEW_GAPS = 300;
const FEW_TOKENS = 200;
const TOLD_APART = 1.05;

/** The plot in a sentence or two, once enough tokens were timed. */
function verdictOf(points) {
  if (!points.length) return "No answers yet to time. Send some, or try the loupe.";
  const few = points.filter((p) => p.gaps < FEW_GAPS).map((p) => p.variant.name);
  if (few.length) return `Too few tokens timed yet to tell: ${few.join(", ")}.`;
  if (points.length === 1) return `Only ${points[0].variant.name} has answered so far.`;
  return `${leaders(points)}${losers(points)}`;
}

/** Speeds within five percent of each other are called the same: they move by that much from minute to minute. */
function leaders(points) {
  const [smallest] = points.toSorted((a, b) => a.size - b.size);
  const top = Math.max(...points.map((p) => p.speed));
  const fastest = points.filter((p) => p.speed * TOLD_APART > top);
  if (fastest.length === points.length) return `All are about as fast; ${smallest.variant.name} is smallest.`;
  if (fastest.length > 1) return `${listed(fastest)} are about as fast; ${smallest.variant.name} is smallest.`;
  if (fastest[0] === smallest) return `${smallest.variant.name} is both fastest and smallest.`;
  return `${fastest[0].variant.name} is fastest, ${smallest.variant.name} smallest.`;
}

function losers(points) {
  const beats = (other, p) => other.speed > p.speed * TOLD_APART && other.size < p.size;
  const beaten = points.filter((p) => points.some((other) => beats(other, p)));
  return beaten.length ? ` Another variant is both faster and smaller than ${listed(beaten)}.` : "";
}

/** Who stays within the guard of its precision, once enough tokens were scored. */
function qualityOf(scored) {
  const known = scored.filter(({ variant }) => variant.stats.drift.tokens >= FEW_TOKENS && variant.driftGuard > 0);
  if (!known.length) return "";
  const beyond = known.filter((p) => p.drift > p.variant.driftGuard);
  const within = known.filter((p) => !beyond.includes(p)).toSorted((a, b) => a.size - b.size);
  const closest = known.toSorted((a, b) => a.drift - b.drift)[0];
  const said = [` ${closest.variant.name} stays closest to the reference`];
  if (within.length) said.push(`the smallest within its guard is ${within[0].variant.name}`);
  if (beyond.length) said.push(`${listed(beyond)} ${beyond.length > 1 ? "are" : "is"} beyond it`);
  return `${said.join("; ")}.`;
}

const listed = (points) => points.map((p) => p.variant.name).join(" and ");
