// One variant's answer on the page: its numbers, its tokens coloured by probability, and where it parts from another's.

import { el, setAttribute, setText } from "../dom.js";
import { bytes, count, duration, number, percent } from "../format.js";
import { markOf, seriesClass } from "../palette.js";
import { Spelling, divergence } from "./answer.js";

const LEVELS = [0.01, 0.1, 0.3, 0.6];

/** 0 (hardly possible) to 4 (likely). */
export const levelOf = (logprob) => LEVELS.filter((level) => Math.exp(logprob) >= level).length;

export class Column {
  answer = null;
  #variant;
  #inspect;
  #spelling = new Spelling();
  #here = -1;
  #facts = el("dl", { class: "facts" });
  #verdict = el("p", { class: "verdict" }, "Waiting …");
  #tokens = el("div", { class: "tokens", tabindex: 0, role: "region" });

  /** `inspect(column, index)` is told which token a person looks at. */
  constructor(variant, inspect) {
    this.#variant = variant;
    this.#inspect = inspect;
    this.name = variant.name;
    this.#tokens.setAttribute("aria-label", `Answer of ${variant.name}; the arrow keys go from token to token`);
    const head = el("h3", { class: `name ${seriesClass(variant)}` }, `${markOf(variant)} ${variant.name}`);
    this.node = el("article", { class: "column" }, head, this.#facts, this.#verdict, this.#tokens);
    this.#tokens.addEventListener("keydown", (event) => this.#onKey(event));
    this.#tokens.addEventListener("pointerover", ({ target }) => this.#onToken(target));
    this.#tokens.addEventListener("click", ({ target }) => this.#onToken(target));
  }

  /** Show what has come; `reference` is the answer it is held against, null for the reference itself. */
  update(answer, reference, colouring) {
    this.answer = answer;
    for (const token of answer.tokens.slice(this.#tokens.children.length)) {
      this.#tokens.append(el("span", { class: "token" }, this.#spelling.next(token.name)));
    }
    this.colour(colouring);
    this.#mark(reference ? divergence(answer, reference) : null);
    this.#show();
    this.#judge(reference);
  }

  colour(colouring) {
    const { tokens, scores } = this.answer;
    const byReference = colouring === "reference" && scores;
    [...this.#tokens.children].forEach((node, index) => {
      const logprob = byReference ? scores[index].logprob : tokens[index].logprob;
      setAttribute(node, "data-level", String(levelOf(logprob)));
    });
  }

  fail(message) {
    setText(this.#verdict, message);
    this.node.classList.add("failed");
  }

  select(index) {
    this.#here = index;
    [...this.#tokens.children].forEach((node, i) => node.classList.toggle("here", i === index));
  }

  #mark(index) {
    [...this.#tokens.children].forEach((node, i) => {
      node.classList.toggle("diverged", i === index);
      node.classList.toggle("after", index !== null && i > index);
    });
  }

  #show() {
    const { answer } = this;
    const facts = [
      ["first token", duration(answer.firstTokenSeconds)],
      ["tokens/s", speedOf(answer)],
      ["tokens", count(answer.tokens.length)],
      ["weights", bytes(this.#variant.storedBytes)],
    ];
    this.#facts.replaceChildren(...facts.map(([name, value]) => el("div", {}, el("dt", {}, name), el("dd", {}, value))));
  }

  #judge(reference) {
    const { answer } = this;
    const at = reference ? divergence(answer, reference) : null;
    const ended = answer.finishReason !== null;
    const said = [];
    if (!reference) said.push("The reference.");
    else if (at !== null) said.push(`Parts from the reference at token ${at + 1}.`);
    else said.push(ended ? "Word for word the reference's answer." : "The same so far.");
    if (reference && answer.scores) said.push(agreement(answer));
    setText(this.#verdict, said.join(" "));
  }

  #onToken(target) {
    const index = [...this.#tokens.children].indexOf(target);
    if (index >= 0) this.#inspect(this, index);
  }

  #onKey(event) {
    const last = this.#tokens.children.length - 1;
    const goal = { ArrowRight: this.#here + 1, ArrowLeft: this.#here - 1, Home: 0, End: last }[event.key];
    if (goal === undefined || last < 0) return;
    event.preventDefault();
    this.#inspect(this, Math.min(last, Math.max(0, goal)));
  }
}

function speedOf({ finishReason, tokensPerSecond, leastTokensPerSecond }) {
  if (Number.isFinite(tokensPerSecond) || finishReason === null) return number(tokensPerSecond);
  return `≥ ${number(leastTokensPerSecond, 2)}`;
}

function agreement({ tokens, scores }) {
  const same = tokens.filter((token, index) => token.name === scores[index].choice).length;
  const meanGap = tokens.reduce((total, token, index) => total + token.logprob - scores[index].logprob, 0) / tokens.length;
  const judged = `${count(same)} of ${count(tokens.length)} tokens are the reference's first choice`;
  if (Math.abs(meanGap) < 5e-4) return `${judged}, which finds them as likely.`;
  return `${judged}, which finds them ${number(Math.abs(meanGap), 2)} nats a token ${meanGap > 0 ? "less" : "more"} likely.`;
}

/** A token in words: what it is, how likely it was to either, and what else could have stood there. */
export function describe(column, index, referenceName) {
  const token = column.answer.tokens[index];
  const score = column.answer.scores?.[index];
  const quoted = (name) => `“${name.replaceAll("\n", "⏎")}”`;
  const chance = (logprob) => percent(Math.exp(logprob), 2);
  const others = token.top.filter(([name]) => name !== token.name).map(([name, logprob]) => `${quoted(name)} ${chance(logprob)}`);
  const parts = [`${column.name}, token ${index + 1}: ${quoted(token.name)} ${chance(token.logprob)}`];
  if (others.length) parts.push(`else ${others.join(", ")}`);
  if (score) parts.push(`${referenceName} gives it ${chance(score.logprob)} and would say ${quoted(score.choice)} (${chance(score.choiceLogprob)})`);
  return `${parts.join("; ")}.`;
}
