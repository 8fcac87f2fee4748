// Asks the server about once a second: not while nobody looks, and ever more seldom while it does not answer.

import { ServerError, getJson, getText } from "./client.js";
import { readSnapshot } from "./snapshot.js";

const PERIOD_MS = 1000;
const LONGEST_MS = 15000;
const REPORT_EVERY = 5;
const ADMIN = ["admin/variants", "admin/traffic", "admin/rollouts"];

/**
 * Calls `onSnapshot(snapshot, refusal)`, where `refusal` is why the admin routes are closed to us, or null; and
 * `onError(error, retryMs)` where a look failed. What only a key would mend (401) stops the looking until `now()`.
 */
export class Poller {
  #timer = 0;
  #failures = 0;
  #looking = false;
  #refusal = null;
  #newest = null;
  #routes = null;
  #report = null;
  #looks = 0;
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
    this.#looks = 0;
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
      this.#onError(error, waitMs);
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
    try {
      const [variants, traffic, rollouts] = await Promise.all(ADMIN.map(getJson));
      return { variants: variants.variants, traffic, rollouts: await this.#withNewest(rollouts), experiments: await this.#experiments() };
    } catch (error) {
      if (!(error instanceof ServerError && (error.status === 401 || error.status === 403))) throw error;
      this.#refusal = error;
      return null;
    }
  }

  /** The rollout that runs, or ran last, in detail. One that has ended is asked for once. */
  async #withNewest(list) {
    const newest = list.rollouts.find((rollout) => rollout.id === list.active) ?? list.rollouts[0] ?? null;
    const known = this.#newest?.id === newest?.id && this.#newest?.phase === newest?.phase && newest?.ended;
    if (!known) this.#newest = newest && (await getJson(`admin/rollouts/${newest.id}`));
    return { list, shown: this.#newest };
  }

  /** Only where the server has them. */
  async #experiments() {
    this.#routes ??= (await getJson(".")).routes;
    if (!this.#routes.includes("/admin/experiments")) return null;
    const list = await getJson("admin/experiments");
    const name = list.active ?? list.experiments[0]?.name ?? null;
    const stale = this.#report?.experiment.name !== name || this.#looks % REPORT_EVERY === 0;
    this.#looks += 1;
    if (stale) this.#report = name && (await getJson(`admin/experiments/${encodeURIComponent(name)}/report`));
    return { list, report: this.#report };
  }
}
