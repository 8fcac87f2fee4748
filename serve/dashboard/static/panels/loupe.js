// The loupe: one prompt through several variants side by side, every token with its probability.

import { ServerError } from "../client.js";
import { el, keyed, setText, show } from "../dom.js";
import { Column, describe } from "../loupe/column.js";
import { ask, chatPrompt, score } from "../loupe/answer.js";
import { markOf, seriesClass } from "../palette.js";
import { panel } from "./panel.js";

const AT_ONCE = 4;
const LEVEL_NAMES = ["<1 %", "1–10 %", "10–30 %", "30–60 %", ">60 %"];

export function loupePanel() {
  const loupe = new Loupe();
  const lead = "One prompt, several precisions. With temperature 0, or one seed for all, only the weights can make answers differ.";
  return panel({ id: "loupe", title: "Loupe", lead, update: (view) => loupe.update(view) }, loupe.node);
}

class Loupe {
  #view = null;
  #columns = [];
  #running = null;
  #touched = false;
  #frame = 0;
  #prompt = el("textarea", { rows: 2, id: "loupe-prompt", spellcheck: "false" });
  #variants = el("fieldset", { class: "choices" }, el("legend", {}, "Variants"));
  #boxes = el("div", { class: "boxes" });
  #reference = el("select");
  #form = null;
  #run = el("button", { type: "submit", class: "primary" }, "Compare");
  #stop = el("button", { type: "button", disabled: true }, "Stop");
  #said = el("p", { class: "hint", role: "status" });
  #colouring = colouringChoice(() => this.#onColouring());
  #grid = el("div", { class: "columns" });
  #inspector = el("p", { class: "inspector", "aria-live": "polite" }, "Point at a token, or go through an answer with the arrow keys.");
  #results = el("div", { hidden: true }, this.#colouring, this.#grid, this.#inspector);

  constructor() {
    this.#prompt.value = "Once upon a time, there was a little fox who";
    this.#variants.append(this.#boxes);
    this.#form = el(
      "form",
      { class: "loupe-form", "aria-label": "Compare variants" },
      el("label", { class: "prompt", for: "loupe-prompt" }, "Prompt", this.#prompt),
      this.#variants,
      el(
        "div",
        { class: "options" },
        el("label", {}, "Held against ", this.#reference),
        el("label", {}, "Sent as ", select("as", [["text", "text"], ["chat", "chat message"]])),
        el("label", {}, "Tokens ", el("input", { type: "number", name: "max_tokens", value: 64, min: 1, max: 2048 })),
        el("label", {}, "Temperature ", el("input", { type: "number", name: "temperature", value: 0, min: 0, max: 2, step: 0.1 })),
        el("label", {}, "Seed ", el("input", { type: "number", name: "seed", value: 1, min: 0, step: 1 })),
        el("label", { title: "Fair speeds: no variant takes the processor from another" }, el("input", { type: "checkbox", name: "in_turn" }), " one after another"),
      ),
      el("div", { class: "buttons" }, this.#run, this.#stop, this.#said),
    );
    this.node = el("div", {}, this.#form, this.#results);
    this.#form.addEventListener("submit", (event) => {
      event.preventDefault();
      void this.#compare();
    });
    this.#prompt.addEventListener("keydown", (event) => {
      if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) this.#form.requestSubmit();
    });
    this.#stop.addEventListener("click", () => this.#running?.abort());
  }

  /** New facts about the variants; what is on the page stays. */
  update(view) {
    this.#view = view;
    keyed(this.#boxes, view.variants, (v) => v.name, makeBox, (box, variant) => {
      const input = box.firstChild;
      input.disabled = variant.state !== "ready";
      if (input.disabled) input.checked = false;
      box.title = variant.state === "ready" ? "" : `${variant.name} is ${variant.state}`;
    });
    const ready = view.variants.filter((variant) => variant.state === "ready");
    const chosen = this.#reference.value || view.reference;
    keyed(this.#reference, ready, (v) => v.name, (v) => el("option", { value: v.name }, v.name), () => {});
    if (this.#reference.value !== chosen) this.#reference.value = chosen;
    this.#run.disabled = this.#running !== null || ready.length === 0;
  }

  async #compare() {
    if (this.#running || !this.#view) return;
    this.#running = new AbortController();
    this.#run.disabled = true;
    this.#stop.disabled = false;
    try {
      await this.#answers(this.#running.signal);
    } catch (error) {
      this.#say(error);
    } finally {
      this.#running = null;
      this.#run.disabled = false;
      this.#stop.disabled = true;
    }
  }

  async #answers(signal) {
    const chosen = this.#chosen();
    const referenceName = this.#reference.value;
    const sampling = this.#sampling();
    this.#columns = chosen.map((variant) => new Column(variant, (column, index) => this.#inspect(column, index, referenceName)));
    this.#grid.replaceChildren(...this.#columns.map((column) => column.node));
    show(this.#results, true);
    setText(this.#said, "Answering …");
    if (!this.#touched) this.#colour("own");
    const reference = chosen.find((variant) => variant.name === referenceName);
    const prompt = this.#asChat ? await chatPrompt(reference.id, this.#prompt.value, signal) : this.#prompt.value;
    const inTurn = this.#form.elements.in_turn.checked;
    const jobs = this.#columns.map((column, index) => () => this.#fill(column, chosen[index].id, prompt, sampling, signal));
    await inBatches(jobs, inTurn ? 1 : AT_ONCE);
    setText(this.#said, `${referenceName} reads the answers …`);
    await inBatches(this.#columns.map((column) => () => this.#judge(column, reference.id, signal)), AT_ONCE);
    if (!this.#touched) this.#colour("reference");
    const fair = inTurn || chosen.length < 2;
    setText(this.#said, fair ? "Done." : "Done. They were answered at once and slowed each other: “one after another” gives fair speeds.");
  }

  async #fill(column, model, prompt, sampling, signal) {
    try {
      await ask(model, prompt, sampling, signal, (answer) => {
        column.answer = answer;
        this.#refresh();
      });
    } catch (error) {
      if (!(error instanceof ServerError)) throw error;
      column.fail(error.message);
    }
  }

  async #judge(column, model, signal) {
    if (!column.answer?.tokens.length) return;
    try {
      column.answer.scores = await score(model, column.answer, signal);
      this.#refresh();
    } catch (error) {
      if (!(error instanceof ServerError)) throw error;
      column.fail(`The reference could not read it: ${error.message}`);
    }
  }

  /** At most once a frame: tokens may come faster than anybody sees them. */
  #refresh() {
    cancelAnimationFrame(this.#frame);
    this.#frame = requestAnimationFrame(() => this.#draw());
  }

  /** All columns: any new token may show where two answers part. */
  #draw() {
    const reference = this.#columns.find((column) => column.name === this.#reference.value)?.answer;
    for (const column of this.#columns) {
      if (column.answer) column.update(column.answer, column.answer === reference ? null : reference, this.#colourValue);
    }
  }

  #chosen() {
    const names = [...this.#boxes.querySelectorAll("input:checked")].map((input) => input.value);
    const wanted = new Set([...names, this.#reference.value]);
    return this.#view.variants.filter((variant) => wanted.has(variant.name) && variant.state === "ready");
  }

  #sampling() {
    const { max_tokens: tokens, temperature, seed } = this.#form.elements;
    return { max_tokens: tokens.valueAsNumber, temperature: temperature.valueAsNumber, seed: seed.valueAsNumber };
  }

  get #asChat() {
    return this.#form.elements.as.value === "chat";
  }

  get #colourValue() {
    return this.#colouring.querySelector("input:checked").value;
  }

  #colour(value) {
    this.#colouring.querySelector(`input[value=${value}]`).checked = true;
    this.#refresh();
  }

  #onColouring() {
    this.#touched = true;
    this.#refresh();
  }

  #inspect(column, index, referenceName) {
    for (const other of this.#columns) other.select(index);
    setText(this.#inspector, describe(column, index, referenceName));
  }

  #say(error) {
    if (error.name !== "AbortError" && !(error instanceof ServerError)) throw error;
    setText(this.#said, error.name === "AbortError" ? "Stopped." : error.message);
  }
}

function makeBox(variant) {
  const input = el("input", { type: "checkbox", value: variant.name, checked: variant.state === "ready" });
  return el("label", { class: `name ${seriesClass(variant)}` }, input, ` ${markOf(variant)} ${variant.name}`);
}

function select(name, options) {
  return el("select", { name }, options.map(([value, text]) => el("option", { value }, text)));
}

function colouringChoice(onChange) {
  const choice = (value, text, checked) => {
    return el("label", {}, el("input", { type: "radio", name: "colouring", value, checked, onchange: onChange }), ` ${text}`);
  };
  const scale = LEVEL_NAMES.map((name, level) => el("span", { class: "token", "data-level": level }, name));
  return el(
    "fieldset",
    { class: "colouring" },
    el("legend", {}, "Colour by"),
    choice("own", "the variant's own probability", true),
    choice("reference", "the reference's probability"),
    el("span", { class: "scale" }, scale),
  );
}

/** Run asynchronous jobs, so many at once. A browser opens six connections to one server, and the page needs some. */
async function inBatches(jobs, size) {
  const waiting = [...jobs];
  const work = async () => {
    while (waiting.length) await waiting.shift()();
  };
  await Promise.all(Array.from({ length: size }, work));
}
