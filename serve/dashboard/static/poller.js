// Asks the server about once a second: not while nobody looks, and ever more seldom while it does not answer.
//
// The page lives on /metrics and the list of models. What the admin routes tell is asked for beside that, each by
// itself: one that is slow, or fails, keeps its last answer and says how old it is, and holds up nothing else.

import { ServerError, getJson, getText } from "./client.js";
import { readSnapshot } from "./snapshot.js";
import { Source } from "./source.js";

const PERIOD_MS = 1000;
const LONGEST_MS = 15000;
const PATIENCE_MS = 1500;
const REPORT_EVERY_MS = 5000;

/**
 * Calls `onSnapshot(snapshot, refusal)`, where `refusal` is why the admin routes are closed to us, or null; and
 * `onError(error, retryMs, failures)` where a look failed, for the so-manieth time in a row. What only a key would mend
 * (401) stops the looking until `now()`.
 */
export class Poller {
  #timer = 0;
  #failures = 0;
  #looking = false;
  #refusal = null;
  #routes = null;
  #sources = {
    variants: new Source(async () => (await getJson("admin/variants")).variants),
    traffic: new Source(() => getJson("admin/traffic")),
    rollouts: new Source(rolloutsAfter),
    experiments: new Source((before) => this.#experimentsAfter(before)),
  };
  #onSnapshot;
  #onError;

  constructor(onSnapshot, onError) {
    this.#onSnapshot = onSnapshot;
    this.#onError = onError;
    document.addEventListener("visibilitychange", () => this.#schedule(0));
  }

  /** Look at once, with whatever key there is now. */
  now() {
    this.#failures = 0;
    this.#refusal = null;
    if (this.#sources.experiments.value) this.#sources.experiments.value.reportAtMs = 0;
    this.#schedule(0);
  }

  #schedule(waitMs) {
    clearTimeout(this.#timer);
    if (!document.hidden && Number.isFinite(waitMs)) this.#timer = setTimeout(() => this.#look(), waitMs);
  }

  async #look() {
    if (this.#looking) return;
    this.#looking = true;
    let waitMs = PERIOD_MS;
    try {
      const snapshot = await this.#snapshot();
      this.#failures = 0;
      this.#onSnapshot(snapshot, this.#refusal);
    } catch (error) {
      if (!(error instanceof ServerError)) throw error;
      this.#failures += 1;
      waitMs = error.status === 401 ? Infinity : Math.min(LONGEST_MS, PERIOD_MS * 2 ** this.#failures);
      this.#onError(error, waitMs, this.#failures);
    } finally {
      this.#looking = false;
      this.#schedule(waitMs);
    }
  }

  async #snapshot() {
    const metrics = await getText("metrics");
    const [models, admin] = await Promise.all([getJson("v1/models"), this.#admin()]);
    return readSnapshot(metrics, models.data, admin, Date.now());
  }

  /** The admin routes may be closed to us: the rest of the page lives without them, and does not knock again. */
  async #admin() {
    if (this.#refusal) return null;
    const sources = Object.entries(this.#sources);
    await inTime(Promise.all(sources.map(([, source]) => source.refresh())));
    this.#refusal = sources.map(([, { error }]) => error).find((error) => error?.status === 401 || error?.status === 403) ?? null;
    if (this.#refusal) for (const [, source] of sources) source.forget();
    if (this.#refusal) return null;
    const told = sources.map(([name, { value, atMs }]) => [name, { value, atMs }]);
    return Object.fromEntries(told);
  }

  /** Only where the server has them. */
  async #experimentsAfter(before) {
    this.#routes ??= (await getJson(".")).routes;
    if (!this.#routes.includes("/admin/experiments")) return null;
    const list = await getJson("admin/experiments");
    const name = list.active ?? list.experiments[0]?.name ?? null;
    const state = list.experiments.find((experiment) => experiment.name === name)?.state;
    const known = before?.report?.experiment;
    const fresh = known?.name === name && known?.state === state && Date.now() - before.reportAtMs < REPORT_EVERY_MS;
    if (fresh || !name) return { list, report: name && before.report, reportAtMs: before?.reportAtMs ?? 0 };
    return { list, report: await getJson(`admin/experiments/${encodeURIComponent(name)}/report`), reportAtMs: Date.now() };
  }
}

/** The rollout that runs, or ran last, in detail. One that has ended is asked for once. */
async function rolloutsAfter(before) {
  const list = await getJson("admin/rollouts");
  const newest = list.rollouts.find((rollout) => rollout.id === list.active) ?? list.rollouts[0] ?? null;
  const known = before?.shown?.id === newest?.id && before?.shown?.phase === newest?.phase && newest?.ended;
  return { list, shown: known ? before.shown : newest && (await getJson(`admin/rollouts/${newest.id}`)) };
}

/** Wait for it, but no longer than a person would. */
async function inTime(work) {
  let timer = 0;
  const late = new Promise((resolve) => {
    timer = setTimeout(resolve, PATIENCE_MS);
  });
  await Promise.race([work, late]);
  clearTimeout(timer);
}
