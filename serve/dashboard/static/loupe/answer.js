// One answer token by token, with its clock, and what another variant thinks of the same tokens. No page in here.

import { sendJson, stream } from "../client.js";

const ALTERNATIVES = 3;
const SHORTEST_MS = 20;

/** Grows while it streams. `tokens`: {id, name, logprob, top}; `top` are [name, logprob] pairs, likeliest first. */
export class Answer {
  tokens = [];
  promptIds = [];
  finishReason = null;
  scores = null;
  #sentMs = performance.now();
  #firstMs = NaN;
  #lastMs = NaN;

  get firstTokenSeconds() {
    return (this.#firstMs - this.#sentMs) / 1000;
  }

  /** After the first token, as a reader sees them come; NaN for what came in one piece. */
  get tokensPerSecond() {
    const spanMs = this.#lastMs - this.#firstMs;
    return spanMs < SHORTEST_MS ? NaN : ((this.tokens.length - 1) * 1000) / spanMs;
  }

  /** What it was at least: the whole answer, with the wait for its first token. */
  get leastTokensPerSecond() {
    return (this.tokens.length * 1000) / (this.#lastMs - this.#sentMs);
  }

  take(choice) {
    this.promptIds = choice.prompt_token_ids ?? this.promptIds;
    this.finishReason = choice.finish_reason ?? this.finishReason;
    const { tokens = [], token_logprobs: logprobs = [], top_logprobs: tops = [] } = choice.logprobs ?? {};
    if (!tokens.length) return;
    this.#lastMs = performance.now();
    if (!this.tokens.length) this.#firstMs = this.#lastMs;
    tokens.forEach((name, index) => {
      const top = Object.entries(tops[index] ?? {}).sort((a, b) => b[1] - a[1]);
      this.tokens.push({ id: choice.token_ids?.[index], name, logprob: logprobs[index], top });
    });
  }
}

/** Stream one answer; `onTokens(answer)` after every event. `prompt` is text or token ids. */
export async function ask(model, prompt, sampling, signal, onTokens) {
  const body = { model, prompt, ...sampling, stream: true, logprobs: ALTERNATIVES, return_token_ids: true };
  const answer = new Answer();
  for await (const event of stream("v1/completions", body, signal)) {
    if (event.choices.length) answer.take(event.choices[0]);
    onTokens(answer);
  }
  return answer;
}

/**
 * What `model` thinks of every token of an answer, given the same prompt: {logprob, choice, choiceLogprob}, `choice`
 * being the token that it would have put first. By token ids, so that nothing is tokenized twice.
 */
export async function score(model, answer, signal) {
  const prompt = [...answer.promptIds, ...answer.tokens.map((token) => token.id)];
  const body = { model, prompt, echo: true, logprobs: 1, max_tokens: 0 };
  const { choices } = await sendJson("POST", "v1/completions", body, signal);
  const { token_logprobs: logprobs, top_logprobs: tops } = choices[0].logprobs;
  const from = answer.promptIds.length;
  return answer.tokens.map((_, index) => {
    const [choice, choiceLogprob] = Object.entries(tops[from + index] ?? {}).sort((a, b) => b[1] - a[1])[0] ?? [];
    return { logprob: logprobs[from + index], choice, choiceLogprob };
  });
}

/** The token ids of a conversation of one message, in the model's own template. */
export async function chatPrompt(model, content, signal) {
  const body = { model, messages: [{ role: "user", content }] };
  return (await sendJson("POST", "tokenize", body, signal)).tokens;
}

/** The first place where two answers differ; null while they agree, as far as both have come. */
export function divergence(answer, reference) {
  const length = Math.min(answer.tokens.length, reference.tokens.length);
  for (let index = 0; index < length; index += 1) {
    if (answer.tokens[index].id !== reference.tokens[index].id) return index;
  }
  return null;
}

/** Texts of tokens, in step: a character whose bytes lie in several tokens appears with the last of them. */
export class Spelling {
  #decoder = new TextDecoder();

  next(name) {
    if (!name.startsWith("bytes:")) return this.#decoder.decode() + name;
    const bytes = [...name.matchAll(/\\x([0-9a-f]{2})/g)].map(([, hex]) => Number.parseInt(hex, 16));
    return this.#decoder.decode(new Uint8Array(bytes), { stream: true });
  }
}
