// Who serves what share, as configured and as it came, and the sliders that change it.

import { el, keyed, setAttribute, setText, setVars, show } from "../dom.js";
import { bytes, count, number, percent, span } from "../format.js";
import { sum } from "../history.js";
import { Orders } from "../orders.js";
import { markOf, seriesClass } from "../palette.js";
import { rebalanced, rounded } from "../weights.js";
import { panel } from "./panel.js";

export function trafficPanel(page) {
  const bars = el("div", { class: "shares" });
  const note = el("p", { class: "hint" });
  const totals = el("dl", { class: "facts totals" });
  const editor = new Editor(page);

  function update(view) {
    const rows = rowsOf(view);
    keyed(bars, rows, (row) => row.key, makeBar, updateBar);
    setText(note, noteOf(view));
    const make = ([name]) => el("div", {}, el("dt", {}, name), el("dd"));
    keyed(totals, totalsOf(view), ([name]) => name, make, (node, [, value]) => setText(node.children[1], value));
    editor.update(view);
  }

  const described = { id: "traffic", title: "Traffic", source: "traffic", update };
  return panel(described, el("div", { class: "split" }, el("div", {}, bars, note, totals), editor.node));
}

function rowsOf({ variants, answered, span: { whole, seconds }, snapshot }) {
  const row = (key, label, shareOf) => {
    return { key, label, parts: variants.map((variant) => ({ variant, share: shareOf(variant) || 0 })) };
  };
  const rows = [];
  const configured = snapshot.traffic !== null;
  const moved = variants.some((v) => Math.abs(v.servingShare - v.weight / 100) > 1e-6);
  if (configured) rows.push(row("configured", "Configured", (v) => v.weight / 100));
  if ((!configured || moved) && variants.some((v) => v.servingShare > 0)) rows.push(row("in-force", "In force", (v) => v.servingShare));
  const answers = whole ? "Answered" : `Answered in ${span(seconds)}`;
  if (answered) rows.push(row("answered", answers, (v) => v.answeredShare));
  return rows;
}

/** The whole server in a few numbers. */
function totalsOf({ variants, answered }) {
  const add = (valueOf) => {
    const known = variants.map(valueOf).filter(Number.isFinite);
    return known.length ? known.reduce((total, value) => total + value) : NaN;
  };
  return [
    ["requests/s", number(add((v) => v.now.requestsPerSecond))],
    ["tokens/s", number(add((v) => v.now.tokensPerSecond))],
    ["in flight", count(add((v) => v.running + v.waiting))],
    ["errors", percent(add((v) => sum(v.stats.errors)) / answered, 2)],
    ["weights", bytes(add((v) => v.storedBytes))],
    ["whole memory", bytes(add((v) => v.memory.process))],
  ];
}

function makeBar() {
  return el("div", { class: "share" }, el("span", { class: "label" }), el("div", { class: "bar", role: "img" }));
}

function updateBar(node, { label, parts }) {
  const [name, bar] = node.children;
  setText(name, label);
  const present = parts.filter((part) => part.share > 0);
  setAttribute(bar, "aria-label", `${label}: ${present.map((p) => `${p.variant.name} ${percent(p.share)}`).join(", ")}`);
  keyed(
    bar,
    present,
    (part) => part.variant.name,
    ({ variant }) => el("span", { class: `part ${seriesClass(variant)}` }, el("span", {}, markOf(variant), el("span"), el("span"))),
    (part, { variant, share }) => {
      setVars(part, { "--share": share });
      setAttribute(part, "title", `${variant.name}: ${percent(share)}`);
      const [name, size] = part.firstChild.children;
      setText(name, ` ${variant.name}`);
      setText(size, ` ${percent(share, 2)}`);
    },
  );
}

function noteOf({ variants, answered, snapshot }) {
  const refused = sum(snapshot.refused);
  return [
    absence(variants),
    answered ? `${count(answered)} answers, pinned ones included.` : "Nothing was asked yet. Try the loupe below.",
    refused ? `${count(refused)} requests were refused before they came to a variant (${codes(snapshot.refused)}).` : "",
  ].join(" ");
}

/** Who should serve and cannot, and what becomes of the share. */
function absence(variants) {
  if (!variants.some((v) => v.state === "ready")) return "No variant is ready to serve yet.";
  const absent = variants.filter((v) => v.weight > 0 && v.state !== "ready");
  const told = absent.map((v) => `${v.name} ${v.state === "failed" ? "has failed" : "is loading"}`);
  return told.length ? `${told.join(", ")}; the others take over.` : "";
}

function codes(byCode) {
  const counted = Object.entries(byCode).filter(([, value]) => value > 0);
  return counted.map(([code, value]) => `${code} ${count(value)}`).join(", ");
}

function ownerOf({ rollouts, experiments }) {
  if (rollouts?.list.active) return `The rollout ${rollouts.list.active}`;
  return experiments?.list.active ? `The experiment ${experiments.list.active}` : null;
}

/** Sliders whose sum stays 100. What a person has begun to change is not overwritten by what the server says. */
class Editor {
  #orders;
  #edited = null;
  #server = {};
  #fallback = "";
  #owned = false;
  #sliders = el("div", { class: "sliders" });
  #apply = el("button", { type: "submit", class: "primary" }, "Apply");
  #reset = el("button", { type: "button" }, "Undo");
  #said = el("p", { class: "hint", role: "status" });
  #owner = el("p", { class: "hint" });
  #form = el("form", { "aria-label": "Change the split" }, this.#sliders, el("div", { class: "buttons" }, this.#reset, this.#apply));
  #unlock = el("button", { type: "button" }, "Enter the admin key …");
  #lockedWhy = el("p", { class: "hint" });
  #locked = el("div", { class: "locked" }, this.#lockedWhy, this.#unlock);
  node = el("div", { class: "editor" }, el("h3", {}, "Change the split"), this.#owner, this.#form, this.#said, this.#locked);

  constructor(page) {
    this.#orders = new Orders(page, this.#said);
    this.#form.addEventListener("submit", (event) => {
      event.preventDefault();
      void this.#send();
    });
    this.#reset.addEventListener("click", () => this.#edit(null));
    this.#unlock.addEventListener("click", () => page.askKey("Changing the split takes the admin key."));
  }

  update(view) {
    const open = view.snapshot.traffic !== null;
    show(this.#form, open);
    show(this.#locked, !open);
    if (!open) return this.#explain(view.refusal);
    this.#server = view.snapshot.traffic.weights;
    this.#fallback = view.snapshot.traffic.stable;
    this.#leave(ownerOf(view.snapshot));
    keyed(this.#sliders, view.variants, (v) => v.name, (v) => this.#slider(v), (node, v) => this.#fill(node, v));
    return this.#buttons();
  }

  /** Who deals traffic now, if it is not a hand's to move: then the sliders only show. */
  #leave(owner) {
    this.#owned = owner !== null;
    if (owner && this.#edited) this.#edit(null);
    setText(this.#owner, owner ? `${owner} deals the traffic now; end it to move it by hand.` : "");
    show(this.#owner, this.#owned);
  }

  #explain(refusal) {
    setText(this.#lockedWhy, refusal?.message ?? "The server has not told its split yet.");
    show(this.#unlock, refusal?.status === 401);
  }

  get #weights() {
    return this.#edited ?? this.#server;
  }

  #slider(variant) {
    const slider = el("input", { type: "range", min: 0, max: 100, step: 1, "aria-label": `Share of ${variant.name}, percent` });
    slider.addEventListener("input", () => this.#edit(rebalanced(this.#weights, variant.name, slider.valueAsNumber, this.#fallback)));
    const name = el("span", { class: `name ${seriesClass(variant)}` }, `${markOf(variant)} ${variant.name}`);
    return el("label", { class: "slider" }, name, slider, el("output"));
  }

  #fill(node, { name }) {
    const [, slider, output] = node.children;
    const weight = this.#weights[name] ?? 0;
    slider.disabled = this.#owned;
    if (slider.valueAsNumber !== Math.round(weight)) slider.value = weight;
    setAttribute(slider, "aria-valuetext", `${rounded(weight)} percent`);
    setText(output, `${rounded(weight)} %`);
  }

  #edit(weights, said = weights ? "Not applied yet." : "") {
    this.#edited = weights;
    for (const node of this.#sliders.children) this.#fill(node, { name: node.dataset.key });
    this.#buttons();
    setText(this.#said, said);
  }

  #buttons() {
    this.#apply.disabled = this.#edited === null;
    this.#reset.disabled = this.#edited === null;
  }

  async #send() {
    if (!this.#edited) return;
    const shares = (weights) => Object.entries(weights).map(([name, weight]) => `${name} ${rounded(weight)} %`);
    const told = ({ weights }) => `In force: ${shares(weights).join(", ")}.`;
    const split = await this.#orders.send("PUT", "admin/traffic", { weights: this.#edited }, told, "Not changed");
    if (!split) return;
    this.#server = split.weights;
    this.#edit(null, this.#said.textContent);
  }
}
