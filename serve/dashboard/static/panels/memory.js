// Where each variant's memory is: its weights against what they would take at 16 bits, and all that it holds.

import { el, keyed, setAttribute, setText, setVars } from "../dom.js";
import { bytes, duration, factor, number, percent } from "../format.js";
import { markOf, seriesClass } from "../palette.js";
import { panel } from "./panel.js";

const NAMES = {
  weights: "weights",
  quantization: "scales and tables",
  saved: "saved against 16 bits",
  kv_cache: "KV cache in use",
  kv_free: "KV cache, free",
  allocator: "working memory",
  rest: "runtime and libraries",
};

export function memoryPanel() {
  const legend = el("ul", { class: "legend" }, Object.entries(NAMES).map(([key, name]) => el("li", {}, el("i", { class: `swatch ${key}` }), name)));
  const rows = el("div", { class: "memory" });
  const update = ({ variants }) => {
    const shown = variants.filter((variant) => Number.isFinite(variant.storedBytes));
    const widest = Math.max(...shown.map((variant) => total(storedParts(variant))));
    const whole = Math.max(...shown.map((variant) => total(heldParts(variant))));
    keyed(rows, shown, (v) => v.name, makeRow, (row, v) => updateRow(row, v, widest, whole));
  };
  const available = ({ variants }) => variants.some((variant) => Number.isFinite(variant.storedBytes));
  const lead = "Above: the stored weights. Below, thin and on a scale of its own: all that the variant holds now.";
  return panel({ id: "memory", title: "Memory", lead, update, available }, legend, rows);
}

const total = (parts) => parts.reduce((sum, part) => sum + part.size, 0);

const savedBytes = (variant) => Math.max(0, variant.storedBytes * (variant.compressionRatio - 1) || 0);

function storedParts(variant) {
  const { weights, quantization } = variant.memory;
  return parts({ weights, quantization, saved: savedBytes(variant) });
}

/** What is really there of it, which adds up to the process, or to its share of a GPU (docs/OPERATIONS.md). */
function heldParts({ memory, kvUsage }) {
  const { weights_resident: weights, quantization, kv_cache_resident: cache = 0, allocator, runtime: rest } = memory;
  const used = Math.min(memory.kv_cache_used ?? memory.kv_cache * (kvUsage || 0), cache);
  return parts({ weights, quantization, kv_cache: used, kv_free: cache - used, allocator, rest });
}

function parts(sizes) {
  const known = Object.entries(sizes).filter(([, size]) => size > 0);
  return known.map(([key, size]) => ({ key, size }));
}

function makeRow(variant) {
  return el(
    "div",
    { class: `memory-row ${seriesClass(variant)}` },
    el("span", { class: "name" }, `${markOf(variant)} ${variant.name}`),
    el("div", { class: "bar", role: "img" }),
    el("div", { class: "bar thin", role: "img" }),
    el("dl", { class: "facts" }),
  );
}

function updateRow(row, variant, widest, whole) {
  const [, stored, held, facts] = row.children;
  updateBar(stored, storedParts(variant), widest);
  updateBar(held, heldParts(variant), whole);
  const make = ([name]) => el("div", {}, el("dt", {}, name), el("dd"));
  keyed(facts, factsOf(variant), ([name]) => name, make, (node, [, value]) => setText(node.children[1], value));
}

function updateBar(bar, shown, widest) {
  setAttribute(bar, "aria-label", shown.map(({ key, size }) => `${NAMES[key]} ${bytes(size)}`).join(", "));
  const make = ({ key }) => el("span", { class: `part ${key}` });
  keyed(bar, shown, ({ key }) => key, make, (node, { key, size }) => {
    setVars(node, { "--share": size / widest });
    setAttribute(node, "title", `${NAMES[key]}: ${bytes(size)}`);
  });
}

function factsOf(variant) {
  return [
    ["stored", bytes(variant.storedBytes)],
    ["saved", `${percent(1 - 1 / variant.compressionRatio)} (${bytes(savedBytes(variant))})`],
    ["ratio", factor(variant.compressionRatio)],
    ["bits per weight", number(variant.bitsPerWeight)],
    ["KV cache reserved", bytes(variant.memory.kv_cache)],
    ["whole process", bytes(variant.memory.process)],
    ["peak while loading", bytes(variant.peakLoadBytes)],
    ["loaded in", duration(variant.loadTotalSeconds)],
  ];
}
