// The experiment that runs or ran last: what each variant got, and how it differs from the baseline at equal load.

import { el, keyed, setText, show } from "../dom.js";
import { count, duration, number, percent, span } from "../format.js";
import { Orders } from "../orders.js";
import { markOf, seriesClass } from "../palette.js";
import { panel } from "./panel.js";

/** How a comparison's measure is called in a line. */
const MEASURES = { ttft: "TTFT", itl: "ITL", tpot: "TPOT", e2e: "E2E" };
const UNDECIDED = { "no difference shown": "no difference shown", "too little data": "too little data yet" };
const TITLES = ["Variant", "Answers", "First token, p50", "Next token, mean", "Errors", "Tokens/s", "KL, nats", "Cost per million tokens"];

export function experimentPanel(page) {
  const experiments = new Experiments(page);
  const lead = "Users dealt to variants for a while, and what each got. Intervals hold while one watches.";
  const available = (view) => view.snapshot.experiments !== null;
  const described = { id: "experiments", title: "Experiments", lead, source: "experiments", available };
  return panel({ ...described, update: (view) => experiments.update(view) }, experiments.node);
}

class Experiments {
  #orders;
  #name = "";
  #head = el("p", { class: "verdict" });
  #stop = el("button", { type: "button" }, "Stop");
  #said = el("p", { class: "hint", role: "status" });
  #body = el("tbody");
  #split = el("p", { class: "hint" });
  #comparisons = el("ul", { class: "lines" });
  #current = el(
    "div",
    {},
    this.#head,
    el("div", { class: "wide" }, el("table", { class: "choice", "aria-label": "What each variant got" }, el("thead", {}, el("tr", {}, TITLES.map((t) => el("th", { scope: "col" }, t)))), this.#body)),
    this.#comparisons,
    this.#split,
    el("div", { class: "buttons" }, this.#stop),
  );
  #form = new Starter((body) => this.#orders.send("POST", "admin/experiments", body, (e) => `${e.name} is ${e.state}.`));
  node = el("div", { class: "editor" }, this.#current, this.#said, this.#form.node);

  constructor(page) {
    this.#orders = new Orders(page, this.#said);
    this.#stop.addEventListener("click", () => void this.#end());
  }

  update(view) {
    const { list, report } = view.snapshot.experiments;
    show(this.#current, report !== null);
    if (report) this.#tell(report, view.variants);
    this.#form.update(view, list.active !== null);
  }

  #tell(report, known) {
    const { experiment, variants, comparisons, split } = report;
    this.#name = experiment.name;
    this.#stop.disabled = experiment.state === "ended";
    setText(this.#head, sentenceOf(report));
    keyed(this.#body, variants, (v) => v.variant, (v) => rowOf(v, known), updateRow);
    keyed(this.#comparisons, findingsOf(comparisons), (line) => line, () => el("li"), setText);
    setText(this.#split, `The split: ${split.sentence}.`);
  }

  async #end() {
    if (confirm(`Stop ${this.#name}? Traffic is then again what it was before.`)) {
      const path = `admin/experiments/${encodeURIComponent(this.#name)}/stop`;
      await this.#orders.send("POST", path, {}, (e) => `${e.name} has ended.`);
    }
  }
}

/** A name and how long; the split is the one in force. */
class Starter {
  #weights = {};
  #name = el("input", { name: "name", required: true, size: 14, autocomplete: "off" });
  #hours = el("input", { type: "number", name: "hours", value: 1, min: 0.01, step: "any" });
  #price = el("input", { type: "number", name: "price", min: 0, step: "any", placeholder: "none" });
  #begin = el("button", { type: "submit", class: "primary" }, "Start experiment");
  #form = el(
    "form",
    { class: "options", "aria-label": "Start an experiment" },
    el("label", {}, "Name ", this.#name),
    el("label", {}, "Hours ", this.#hours),
    el("label", {}, "Price of a machine's hour ", this.#price),
    this.#begin,
    el("span", { class: "hint" }, "with the split that is in force"),
  );
  node = this.#form;

  constructor(send) {
    this.#form.addEventListener("submit", (event) => {
      event.preventDefault();
      const dealt = Object.entries(this.#weights).filter(([, weight]) => weight > 0);
      const body = { name: this.#name.value.trim(), weights: Object.fromEntries(dealt), duration_s: this.#hours.valueAsNumber * 3600 };
      const price = this.#price.valueAsNumber;
      void send(Number.isFinite(price) ? { ...body, price_per_hour: price } : body);
    });
  }

  update({ snapshot }, running) {
    this.#weights = snapshot.traffic?.weights ?? {};
    this.#begin.disabled = running || snapshot.traffic === null;
  }
}

function sentenceOf({ experiment, elapsed_s: elapsed }) {
  const { name, state, stopped_by: by, baseline, price_per_hour: price } = experiment;
  const endings = { time: "has ended: its time was over", operator: "was stopped by the operator" };
  const how = state === "ended" ? (endings[by] ?? "has ended") : `is ${state}`;
  const paid = price ? `, ${number(price)} an hour` : "";
  return `${name} ${how}. ${span(elapsed)}, held against ${baseline}${paid}.`;
}

/** A line for every difference that is shown, and one per variant for all that is not. */
function findingsOf(comparisons) {
  const shown = comparisons.filter(({ result }) => !(result in UNDECIDED)).map(({ sentence }) => `${sentence}.`);
  const open = new Map();
  for (const { variant, measure, result } of comparisons.filter((c) => c.result in UNDECIDED)) {
    const key = `${variant}: ${UNDECIDED[result]}`;
    open.set(key, [...(open.get(key) ?? []), MEASURES[measure] ?? measure.replaceAll("_", " ")]);
  }
  return [...shown, ...[...open].map(([said, measures]) => `${said} (${measures.join(", ")}).`)];
}

function rowOf({ variant }, known) {
  const shown = known.find(({ name }) => name === variant);
  const name = shown ? el("span", { class: `name ${seriesClass(shown)}` }, `${markOf(shown)} ${variant}`) : variant;
  const cells = TITLES.slice(1).map(() => el("td", {}, el("span", { class: "main" }), el("span", { class: "second" })));
  return el("tr", {}, el("th", { scope: "row" }, name), cells);
}

function updateRow(row, v) {
  const texts = [
    [count(v.n), `${count(v.units)} users`],
    interval(v.ttft_s.p50, (x) => duration(x, 2)),
    interval(v.itl_s.mean, (x) => duration(x, 2)),
    interval(v.error_rate, (x) => percent(x, 2)),
    [number(v.tokens_per_s)],
    v.drift ? interval(v.drift.kl_divergence_nats, (x) => number(x, 2)) : ["not measured"],
    [number(v.cost_per_million_tokens)],
  ];
  texts.forEach(([main, second = ""], index) => {
    setText(row.children[index + 1].children[0], main);
    setText(row.children[index + 1].children[1], second);
  });
}

function interval(given, format) {
  const { estimate, low, high } = given ?? {};
  return [format(estimate), low == null ? "" : `${format(low)} to ${high == null ? "?" : format(high)}`];
}
