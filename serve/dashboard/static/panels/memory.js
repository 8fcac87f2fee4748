// Where each variant's memory is, by component, against what the same weights would take at 16 bits.

import { el, keyed, setAttribute, setText, setVars } from "../dom.js";
import { bytes, duration, factor, number, percent } from "../format.js";
import { markOf, seriesClass } from "../palette.js";
import { panel } from "./panel.js";

const COMPONENTS = [
  ["weights", "weights"],
  ["quantization", "scales and tables"],
  ["kv_cache", "KV cache"],
  ["activations", "activations"],
];

export function memoryPanel() {
  const legend = el(
    "ul",
    { class: "legend" },
    COMPONENTS.slice(0, 3).map(([key, name]) => el("li", {}, el("i", { class: `swatch ${key}` }), name)),
    el("li", {}, el("i", { class: "swatch saved" }), "saved against 16 bits"),
  );
  const rows = el("div", { class: "memory" });
  const update = ({ variants }) => {
    const shown = variants.filter((v) => Number.isFinite(v.storedBytes));
    const widest = Math.max(...shown.map((v) => wholeBytes(v)));
    keyed(rows, shown, (v) => v.name, makeRow, (row, v) => updateRow(row, v, widest));
  };
  const available = ({ variants }) => variants.some((v) => Number.isFinite(v.storedBytes));
  return panel({ id: "memory", title: "Memory", update, available }, legend, rows);
}

const savedBytes = (variant) => Math.max(0, variant.storedBytes * (variant.compressionRatio - 1) || 0);

function partsOf(variant) {
  const present = COMPONENTS.filter(([key]) => variant.memory[key] > 0);
  return present.map(([key, name]) => ({ key, name, size: variant.memory[key] }));
}

const wholeBytes = (variant) => partsOf(variant).reduce((total, part) => total + part.size, 0) + savedBytes(variant);

function makeRow(variant) {
  return el(
    "div",
    { class: `memory-row ${seriesClass(variant)}` },
    el("span", { class: "name" }, `${markOf(variant)} ${variant.name}`),
    el("div", { class: "bar", role: "img" }),
    el("dl", { class: "facts" }),
  );
}

function updateRow(row, variant, widest) {
  const [, bar, facts] = row.children;
  const saved = { key: "saved", name: "saved against 16 bits", size: savedBytes(variant) };
  const parts = [...partsOf(variant), saved].filter((part) => part.size > 0);
  // What was saved stands beside what is stored, the KV cache after both.
  const order = ["weights", "quantization", "saved", "kv_cache", "activations"];
  parts.sort((a, b) => order.indexOf(a.key) - order.indexOf(b.key));
  setAttribute(bar, "aria-label", parts.map((part) => `${part.name} ${bytes(part.size)}`).join(", "));
  keyed(bar, parts, (part) => part.key, (part) => el("span", { class: `part ${part.key}` }), (node, part) => {
    setVars(node, { "--share": part.size / widest });
    setAttribute(node, "title", `${part.name}: ${bytes(part.size)}`);
  });
  keyed(facts, factsOf(variant), ([name]) => name, ([name]) => el("div", {}, el("dt", {}, name), el("dd")), (node, [, value]) => {
    setText(node.children[1], value);
  });
}

function factsOf(variant) {
  return [
    ["stored", bytes(variant.storedBytes)],
    ["saved", `${percent(1 - 1 / variant.compressionRatio)} (${bytes(savedBytes(variant))})`],
    ["ratio", factor(variant.compressionRatio)],
    ["bits per weight", number(variant.bitsPerWeight)],
    ["KV cache", bytes(variant.memory.kv_cache)],
    ["whole process", bytes(variant.memory.process)],
    ["peak while loading", bytes(variant.peakLoadBytes)],
    ["loaded in", duration(variant.loadTotalSeconds)],
  ];
}
