// uPlot as this page uses it: series named at their right end, colours from the theme, a size that follows the page.

import { el, setText } from "./dom.js";
import { clock } from "./format.js";
import { colorOf, dashOf, markOf, themed } from "./palette.js";

const uPlot = globalThis.uPlot;
const FONT = '11px system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif';
const HEIGHT = 168;
const LABEL_GAP = 13;
const SHORTEST_S = 60;
const STEPS = [1, 2, 5, 10, 20, 50, 100, 200, 500];
const BYTE_STEPS = [0, 1, 2, 3, 4].flatMap((power) => STEPS.map((step) => step * 1024 ** power));

const charts = new Set();

export function redrawAll() {
  for (const chart of charts) chart.redraw(false, true);
}

/** `format` writes a value on the axis and in the readout. */
function axis(format, options = {}) {
  return {
    stroke: () => themed("--muted"),
    grid: { stroke: () => themed("--line"), width: 1 },
    ticks: { show: false },
    font: FONT,
    gap: 4,
    values: (_, values) => values.map((value) => (value === null ? null : format(value))),
    ...options,
  };
}

/** A titled figure with an empty plot. `update(variants, data)` makes it anew only when the variants change. */
class Figure {
  #plot = null;
  #host = el("div", { class: "plot" });
  #readout = el("span", { class: "readout" });
  #names = "";

  constructor({ title, note, height = HEIGHT }) {
    this.height = height;
    this.node = el(
      "figure",
      { class: "chart", role: "group" },
      el("figcaption", {}, el("strong", {}, title), note ? el("span", { class: "note" }, note) : null, this.#readout),
      this.#host,
    );
    this.title = title;
    this.#host.setAttribute("role", "img");
    new ResizeObserver(() => this.#resize()).observe(this.#host);
  }

  /** `options(variants)` are uPlot's; `summary` is the chart in words. */
  draw(variants, data, summary) {
    const names = variants.map((variant) => variant.name).join("\n");
    if (!this.#plot || names !== this.#names) this.#make(variants, data);
    else this.#plot.setData(data);
    this.#names = names;
    this.#host.setAttribute("aria-label", `${this.title}. ${summary}`);
  }

  say(text) {
    setText(this.#readout, text);
  }

  #make(variants, data) {
    if (this.#plot) {
      charts.delete(this.#plot);
      this.#plot.destroy();
    }
    const size = { width: this.#host.clientWidth || 300, height: this.height };
    this.#plot = new uPlot({ ...size, legend: { show: false }, ...this.options(variants) }, data, this.#host);
    charts.add(this.#plot);
  }

  #resize() {
    const width = this.#host.clientWidth;
    if (this.#plot && width && width !== this.#plot.width) this.#plot.setSize({ width, height: this.height });
  }
}

/**
 * Lines over time, one per variant. `data`: seconds since the epoch, then a column per variant (null is a gap).
 * `limitOf(variant)` is drawn as a level line in the variant's colour; NaN is none.
 */
export class TimeChart extends Figure {
  constructor({ format, whole = false, limitOf = () => NaN, ...rest }) {
    super(rest);
    this.format = format;
    this.limitOf = limitOf;
    this.steps = whole ? { incrs: STEPS } : {};
  }

  options(variants) {
    return {
      cursor: { sync: { key: "time" }, drag: { x: false, y: false }, points: { size: 6 } },
      padding: [6, labelWidth(variants), 0, 0],
      scales: { x: { time: true, range: (_, low, high) => [Math.min(low, high - SHORTEST_S), high] }, y: { range: (_, low, high) => [0, this.#top(variants, high)] } },
      axes: [axis((seconds) => clock(seconds * 1000), { space: 70, size: 24 }), axis(this.format, { size: 58, space: 28, ...this.steps })],
      series: [{}, ...variants.map((variant) => line(variant))],
      hooks: {
        draw: [(plot) => nameEnds(plot, variants), (plot) => drawLimits(plot, variants, this.limitOf)],
        setCursor: [(plot) => this.#read(plot, variants)],
      },
    };
  }

  #top(variants, high) {
    const top = Math.max(high ?? 0, ...variants.map(this.limitOf).filter(Number.isFinite));
    return top > 0 ? top * 1.1 : 1;
  }

  #read(plot, variants) {
    const index = plot.cursor.idx;
    if (index === null || index === undefined) return this.say("");
    const values = variants.map((variant, i) => [variant, plot.data[i + 1][index]]).filter(([, value]) => value != null);
    return this.say(
      [clock(plot.data[0][index] * 1000), ...values.map(([v, value]) => `${v.name} ${this.format(value)}`)].join("  ·  "),
    );
  }
}

/** Share of observations up to a time, one step line per variant; a log axis of times. */
export class DistributionChart extends Figure {
  constructor({ format, ...rest }) {
    super(rest);
    this.format = format;
  }

  options(variants) {
    return {
      cursor: { drag: { x: false, y: false }, points: { size: 6 } },
      padding: [8, labelWidth(variants), 0, 0],
      scales: { x: { time: false, distr: 3, range: (_, low, high) => [low, high] }, y: { range: [0, 1] } },
      axes: [
        axis(this.format, { size: 24, filter: leading, grid: { stroke: () => themed("--line"), width: 1, filter: leading } }),
        axis((share) => `${Math.round(share * 100)} %`, { size: 46, splits: () => [0, 0.5, 0.9, 1] }),
      ],
      series: [{}, ...variants.map((variant) => line(variant))],
      hooks: { draw: [(plot) => nameEnds(plot, variants)], setCursor: [(plot) => this.#read(plot, variants)] },
    };
  }

  #read(plot, variants) {
    const index = plot.cursor.idx;
    if (index === null || index === undefined) return this.say("");
    const shares = variants.map((variant, i) => [variant, plot.data[i + 1][index]]).filter(([, share]) => share != null);
    const said = shares.map(([variant, share]) => `${variant.name} ${(share * 100).toFixed(1)} %`);
    return this.say([`≤ ${this.format(plot.data[0][index])}`, ...said].join("  ·  "));
  }
}

/** On a log axis only 1, 2 and 5 times a power of ten are drawn, and only the powers where it is long. */
function leading(plot, splits) {
  const marks = plot.scales.x.max / plot.scales.x.min > 50 ? [1] : [1, 2, 5];
  return splits.map((value) => {
    const digit = value / 10 ** Math.floor(Math.log10(value) + 1e-9);
    return marks.some((mark) => Math.abs(digit - mark) < 1e-6) ? value : null;
  });
}

/** Points named beside their mark, and the front: those that no other point beats in both directions. */
export class FrontChart extends Figure {
  constructor({ xFormat, yFormat, xLabel, yLabel, lowerIsBetter = false, ...rest }) {
    super(rest);
    Object.assign(this, { xFormat, yFormat, xLabel, yLabel, lowerIsBetter });
  }

  /** `points`: {variant, x, y}; where y is better is said by `lowerIsBetter`. */
  plot(points) {
    const ordered = points.toSorted((a, b) => a.x - b.x);
    const front = paretoFront(ordered, this.lowerIsBetter);
    const on = (point) => (front.includes(point) ? point.y : null);
    const data = [ordered.map((p) => p.x), ordered.map(on), ...ordered.map((p) => ordered.map((q) => (p === q ? p.y : null)))];
    const words = ordered.map((p) => `${p.variant.name}: ${this.xFormat(p.x)}, ${this.yFormat(p.y)}`);
    this.draw(ordered.map((point) => point.variant), data, words.join("; "));
  }

  options(variants) {
    const wide = (_, low, high) => [0, high > 0 ? high * 1.22 : 1];
    return {
      cursor: { show: false },
      padding: [14, 18, 0, 0],
      scales: { x: { time: false, range: wide }, y: { range: wide } },
      axes: [
        axis(this.xFormat, { size: 26, space: 70, incrs: BYTE_STEPS, label: this.xLabel, labelFont: FONT, labelSize: 16 }),
        axis(this.yFormat, { size: 56, space: 34, label: this.yLabel, labelFont: FONT, labelSize: 16 }),
      ],
      series: [
        {},
        { stroke: () => themed("--muted"), width: 1, dash: [3, 3], spanGaps: true, points: { show: false } },
        ...variants.map((variant) => ({ stroke: () => colorOf(variant), width: 0, points: { show: false } })),
      ],
      hooks: { draw: [(plot) => nameMarks(plot, variants)] },
    };
  }
}

/** Of points ordered by x (less is better), those with a better y than every one before. */
export function paretoFront(ordered, lowerIsBetter) {
  let best = lowerIsBetter ? Infinity : -Infinity;
  return ordered.filter(({ y }) => {
    const better = lowerIsBetter ? y < best : y > best;
    if (better) best = y;
    return better;
  });
}

function line(variant) {
  return { stroke: () => colorOf(variant), width: 1.75, dash: dashOf(variant), points: { show: false }, spanGaps: false };
}

function labelWidth(variants) {
  return 14 + 6.5 * Math.max(3, ...variants.map((variant) => Math.min(14, variant.name.length + 2)));
}

/** Each line's name at its last value, moved apart where they would cover each other. */
function nameEnds(plot, variants) {
  const ratio = globalThis.devicePixelRatio;
  const labels = variants.map((variant, index) => endOf(plot, variant, index + 1)).filter((label) => label !== null);
  labels.sort((a, b) => a.y - b.y);
  labels.forEach((label, index) => {
    if (index) label.y = Math.max(label.y, labels[index - 1].y + LABEL_GAP * ratio);
  });
  let lowest = plot.bbox.top + plot.bbox.height;
  for (const label of labels.toReversed()) {
    label.y = Math.min(label.y, lowest);
    lowest = label.y - LABEL_GAP * ratio;
    write(plot, `${markOf(label.variant)} ${label.variant.name}`, label.x + 6 * ratio, label.y, label);
  }
}

function drawLimits(plot, variants, limitOf) {
  const { ctx, bbox } = plot;
  for (const variant of variants.filter((candidate) => Number.isFinite(limitOf(candidate)))) {
    const y = plot.valToPos(limitOf(variant), "y", true);
    ctx.save();
    ctx.strokeStyle = colorOf(variant);
    ctx.lineWidth = globalThis.devicePixelRatio;
    ctx.setLineDash([1, 4].map((length) => length * globalThis.devicePixelRatio));
    ctx.beginPath();
    ctx.moveTo(bbox.left, y);
    ctx.lineTo(bbox.left + bbox.width, y);
    ctx.stroke();
    ctx.restore();
  }
}

function endOf(plot, variant, series) {
  const last = plot.data[series].findLastIndex((value) => value !== null && value !== undefined);
  if (last < 0) return null;
  const y = plot.valToPos(plot.data[series][last], "y", true);
  return { variant, x: plot.bbox.left + plot.bbox.width, y };
}

/** A name stands above its mark and to the right, or where else it covers nothing. */
function nameMarks(plot, variants) {
  const ratio = globalThis.devicePixelRatio;
  const at = (index) => [plot.valToPos(plot.data[0][index], "x", true), plot.valToPos(plot.data[index + 2][index], "y", true)];
  const taken = variants.map((_, index) => at(index)).map(([x, y]) => ({ x: x - 6 * ratio, y, width: 12 * ratio }));
  const fromTheTop = [...variants.keys()].sort((a, b) => at(a)[1] - at(b)[1]);
  for (const index of fromTheTop) {
    const variant = variants[index];
    const [x, y] = at(index);
    const width = 6.5 * variant.name.length * ratio;
    const places = [x + 10 * ratio, x - 8 * ratio - width].flatMap((left) => [-9, 10].map((down) => ({ x: left, y: y + down * ratio, width })));
    const isFree = (place) => taken.every((t) => Math.abs(t.y - place.y) > 10 * ratio || place.x + width < t.x || t.x + t.width < place.x);
    const place = places.find(isFree) ?? places[0];
    taken.push(place);
    write(plot, markOf(variant), x - 5 * ratio, y, { variant }, 15);
    write(plot, variant.name, place.x, place.y, { variant });
  }
}

function write(plot, text, x, y, { variant }, size = 11) {
  const ratio = globalThis.devicePixelRatio;
  plot.ctx.save();
  plot.ctx.font = FONT.replace("11px", `600 ${size * ratio}px`);
  plot.ctx.fillStyle = colorOf(variant);
  plot.ctx.textBaseline = "middle";
  plot.ctx.textAlign = "left";
  plot.ctx.fillText(text, x, y);
  plot.ctx.restore();
}
