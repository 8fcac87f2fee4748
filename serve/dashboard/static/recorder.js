// One line chart's numbers: a value per variant and look, each taken over a short sliding window. Bounded.

const KEPT = 900;

export class Recorder {
  #seconds;
  #valueOf;
  #times = [];
  #columns = new Map();

  /** `valueOf(stats, variant)`; what is no finite number is a gap in the line. */
  constructor(seconds, valueOf) {
    this.#seconds = seconds;
    this.#valueOf = valueOf;
  }

  record(view, variants) {
    const at = view.snapshot.atMs / 1000;
    if (at === this.#times.at(-1)) return;
    for (const { name } of variants) {
      if (!this.#columns.has(name)) this.#columns.set(name, this.#times.map(() => null));
    }
    const recent = view.recent(this.#seconds);
    this.#times.push(at);
    for (const [name, column] of this.#columns) {
      const variant = variants.find((candidate) => candidate.name === name);
      const value = variant ? this.#valueOf(recent[name], variant) : NaN;
      column.push(Number.isFinite(value) ? value : null);
    }
    if (this.#times.length > KEPT) for (const column of [this.#times, ...this.#columns.values()]) column.shift();
  }

  /** As uPlot takes it: the times, then a column for each of these variants. */
  data(variants) {
    return [this.#times, ...variants.map((variant) => this.#columns.get(variant.name))];
  }

  /** The newest values in words, for those who do not see the line. */
  summary(variants, format) {
    return variants.map(({ name }) => `${name}: ${format(this.#columns.get(name).at(-1) ?? NaN)}`).join("; ");
  }
}
