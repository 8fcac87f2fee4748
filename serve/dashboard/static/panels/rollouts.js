// The rollout that runs or ran last: where it stands, what the guards say, and what the admin key may do about it.

import { el, keyed, setAttribute, setText, show } from "../dom.js";
import { clock, count, duration, number } from "../format.js";
import { Orders } from "../orders.js";
import { panel } from "./panel.js";

const SHOWN_LINES = 8;
const LONGEST_LINE = 140;
const NONE_YET = "There was none yet.";
const GUARDS = {
  error_rate: "errors",
  degenerate: "empty or looping",
  ttft: "first token (TTFT)",
  itl: "next token (ITL)",
  e2e: "whole answer (E2E)",
  e2e_own_load: "E2E at its own load",
  kl_divergence: "KL divergence",
  top1_agreement: "agreement",
};
const RESULTS = { pass: "within its margin", fail: "worse", inconclusive: "not decided yet", no_data: "no data" };

/** Order, text, when it means something, and what to ask before it is sent. */
const BUTTONS = [
  ["pause", "Pause", (r) => !r.ended && !r.paused, null],
  ["resume", "Resume", (r) => !r.ended && r.paused, null],
  ["promote", "Promote", (r) => r.phase === "awaiting_approval", (r) => `Go on with ${r.canary} after step ${r.step + 1} of ${r.steps}?`],
  ["abort", "Abort", (r) => !r.ended, (r) => `Abort, and send everybody back to ${r.stable}?`],
];

export function rolloutPanel(page) {
  const rollouts = new Rollouts(page);
  const lead = "A canary gets more traffic step by step while every guard holds, and none as soon as one does not.";
  const available = (view) => view.snapshot.rollouts !== null;
  const described = { id: "rollouts", title: "Rollouts", lead, source: "rollouts", available };
  return panel({ ...described, update: (view) => rollouts.update(view) }, rollouts.node);
}

class Rollouts {
  #orders;
  #shown = null;
  #head = el("p", { class: "verdict" });
  #facts = el("dl", { class: "facts totals" });
  #buttons = BUTTONS.map(([order, text, , question]) => el("button", { type: "button", onclick: () => this.#order(order, question) }, text));
  #said = el("p", { class: "hint", role: "status" });
  #guards = el("tbody");
  #table = tableOf("What the guards say", ["Guard", "Result", "Evidence"], this.#guards);
  #lines = el("ol", { class: "lines" });
  #current = el(
    "div",
    {},
    this.#head,
    this.#facts,
    el("div", { class: "buttons" }, this.#buttons),
    el("div", { class: "wide" }, this.#table),
    el("h3", {}, "What happened"),
    this.#lines,
  );
  #starter = new Starter((body) => this.#start(body));
  #past = el("tbody");
  #history = tableOf("Earlier rollouts", ["Rollout", "From, to", "Ended as", "Lasted"], this.#past);
  node = el(
    "div",
    { class: "split" },
    el("div", {}, this.#current, this.#said),
    el("div", { class: "editor" }, this.#starter.node, el("div", { class: "wide" }, this.#history)),
  );

  constructor(page) {
    this.#orders = new Orders(page, this.#said);
  }

  update(view) {
    const { list, shown } = view.snapshot.rollouts;
    this.#shown = shown;
    show(this.#current, shown !== null);
    if (shown) this.#tell(shown);
    else if (!this.#said.textContent) setText(this.#said, NONE_YET);
    if (shown && this.#said.textContent === NONE_YET) setText(this.#said, "");
    this.#starter.update(view, list.active !== null);
    const past = list.rollouts.filter((rollout) => rollout.id !== shown?.id).slice(0, 5);
    show(this.#history, past.length > 0);
    keyed(this.#past, past, (r) => r.id, () => rowOf(4), (row, r) => {
      fill(row, [[r.id], [`${r.stable} → ${r.canary}`], [r.phase.replaceAll("_", " "), r.sentence], [duration(r.lasted_s, 2)]]);
    });
  }

  #tell(rollout) {
    const { plan, verdict } = rollout;
    setText(this.#head, rollout.sentence);
    const step = rollout.step < 0 ? "shadow" : `${rollout.step + 1} of ${rollout.steps} (${plan.steps.map((s) => `${number(s.weight)} %`).join(", ")})`;
    const facts = [
      ["rollout", `${rollout.id}: ${rollout.stable} → ${rollout.canary}`],
      ["phase", rollout.phase.replaceAll("_", " ")],
      ["step", step],
      ["canary gets", `${number(rollout.weight)} %`],
      ["requests judged", `${count(rollout.n_step.canary)} and ${count(rollout.n_step.stable)}`],
    ];
    const make = ([name]) => el("div", {}, el("dt", {}, name), el("dd"));
    keyed(this.#facts, facts, ([name]) => name, make, (node, [, value]) => setText(node.children[1], value));
    BUTTONS.forEach(([, , means], index) => {
      this.#buttons[index].disabled = !means(rollout);
    });
    const findings = verdict?.findings ?? [];
    show(this.#table, findings.length > 0);
    keyed(this.#guards, findings, (f) => f.guard, () => rowOf(3), (row, f) => {
      fill(row, [[GUARDS[f.guard] ?? f.guard.replaceAll("_", " ")], [RESULTS[f.result]], ["", f.sentence]]);
      row.className = f.result;
    });
    const lines = rollout.lines.slice(-SHOWN_LINES);
    keyed(this.#lines, lines, (line) => `${line.at_s} ${line.kind} ${line.sentence}`, () => el("li", {}, el("time"), el("span")), (node, line) => {
      setText(node.children[0], clock(line.at_s * 1000));
      setText(node.children[1], ` ${shortened(line.sentence)}`);
      setAttribute(node, "title", line.sentence);
    });
  }

  async #order(order, question) {
    if (question && !confirm(question(this.#shown))) return;
    const told = (rollout) => `${rollout.id} is ${rollout.phase.replaceAll("_", " ")}.`;
    await this.#orders.send("POST", `admin/rollouts/${this.#shown.id}/${order}`, { by: "dashboard" }, told);
  }

  async #start(body) {
    const told = (answer) => (body.dry_run ? answer.needs.sentence : `${answer.id} has begun: ${answer.sentence}`);
    await this.#orders.send("POST", "admin/rollouts", { ...body, by: "dashboard" }, told);
  }
}

/** Which variant, by which steps; the server's default plan says the rest. */
class Starter {
  #canary = el("select", { name: "to" });
  #steps = el("input", { name: "steps", value: "5, 25, 50", size: 12, inputmode: "numeric", autocomplete: "off" });
  #gate = el("input", { type: "checkbox", name: "gate" });
  #begin = el("button", { type: "submit", class: "primary" }, "Start");
  #preview = el("button", { type: "button" }, "What would it need?");
  #form = el(
    "form",
    { class: "starter", "aria-label": "Start a rollout" },
    el(
      "div",
      { class: "options" },
      el("label", {}, "Canary ", this.#canary),
      el("label", {}, "Steps, percent ", this.#steps),
      el("label", {}, this.#gate, " ask me before it is promoted"),
    ),
    el("div", { class: "buttons" }, this.#preview, this.#begin),
  );
  node = el("div", {}, el("h3", {}, "Start a rollout"), this.#form);

  constructor(send) {
    this.#form.addEventListener("submit", (event) => {
      event.preventDefault();
      void send(this.#body(false));
    });
    this.#preview.addEventListener("click", () => void send(this.#body(true)));
  }

  update({ variants, snapshot }, running) {
    const able = variants.filter((v) => v.state === "ready" && v.name !== snapshot.traffic?.stable);
    keyed(this.#canary, able, (v) => v.name, (v) => el("option", { value: v.name }, v.name), () => {});
    this.#begin.disabled = running || able.length === 0 || snapshot.traffic === null;
    this.#preview.disabled = able.length === 0;
    setAttribute(this.#begin, "title", running ? "One at a time: the one that runs must end first" : null);
  }

  #body(dryRun) {
    const weights = this.#steps.value.split(/[,;\s]+/).filter(Boolean).map(Number);
    const steps = weights.map((weight, index) => {
      return this.#gate.checked && index === weights.length - 1 ? { weight, gate: "approval" } : { weight };
    });
    return { to: this.#canary.value, steps, dry_run: dryRun };
  }
}

/** A verdict names every guard, as the table does: a line has room for the first of them. */
function shortened(sentence) {
  if (sentence.length <= LONGEST_LINE) return sentence;
  return `${sentence.slice(0, sentence.lastIndexOf(" ", LONGEST_LINE))} …`;
}

function tableOf(caption, titles, body) {
  const head = el("tr", {}, titles.map((title) => el("th", { scope: "col" }, title)));
  return el("table", { class: "choice told" }, el("caption", {}, caption), el("thead", {}, head), body);
}

function rowOf(cells) {
  const parts = () => [el("span", { class: "main" }), el("span", { class: "second" })];
  return el("tr", {}, el("th", { scope: "row" }, parts()), Array.from({ length: cells - 1 }, () => el("td", {}, parts())));
}

function fill(row, texts) {
  texts.forEach(([main, second = ""], index) => {
    setText(row.children[index].children[0], main);
    setText(row.children[index].children[1], second);
  });
}
