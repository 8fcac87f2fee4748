// One question that the page asks again and again: its last answer, when that came, and never two of them open at once.

import { ServerError } from "./client.js";

export class Source {
  #ask;
  #open = null;

  /** `ask(before)` resolves to the next value, given the last one; null is "the server has nothing of the kind". */
  constructor(ask) {
    this.#ask = ask;
    this.forget();
  }

  forget() {
    this.value = null;
    this.atMs = null;
    this.error = null;
  }

  /** Ask, or wait for the answer that is under way. An answer that is refused or late leaves the last value as it was. */
  refresh() {
    this.#open ??= this.#once().finally(() => {
      this.#open = null;
    });
    return this.#open;
  }

  async #once() {
    try {
      this.value = await this.#ask(this.value);
      this.atMs = Date.now();
      this.error = null;
    } catch (error) {
      if (!(error instanceof ServerError)) throw error;
      this.error = error;
    }
  }
}
