// One look at the server: what it said at one moment, by variant. Facts only; history.js compares two of them.

import { histogramOf, parse } from "./prometheus.js";

const PREFIX = "halftone_";
const HISTOGRAMS = {
  ttft: "time_to_first_token_seconds",
  itl: "inter_token_latency_seconds",
  e2e: "e2e_request_latency_seconds",
  queue: "request_queue_time_seconds",
  drift: "drift_kl_divergence_nats",
};
const NUMBERS = {
  generationTokens: "generation_tokens_total",
  promptTokens: "prompt_tokens_total",
  running: "num_requests_running",
  waiting: "num_requests_waiting",
  kvUsage: "kv_cache_usage_ratio",
  bitsPerWeight: "model_bits_per_weight",
  compressionRatio: "compression_ratio",
  peakLoadBytes: "memory_peak_load_bytes",
  servingShare: "traffic_weight_ratio",
  driftGuard: "drift_kl_divergence_guard_nats",
  driftTokens: "drift_tokens_total",
  driftAgreements: "drift_top1_agreements_total",
  preemptions: "num_preemptions_total",
};
const BY_LABEL = {
  finished: ["request_success_total", "finished_reason"],
  errors: ["request_errors_total", "code"],
  memory: ["memory_bytes", "component"],
  loadSeconds: ["load_seconds", "stage"],
  driftSamples: ["drift_samples_total", "result"],
};

/**
 * `models`: the list of /v1/models. `admin`: {variants, traffic, rollouts, experiments} of the admin routes, each
 * `{value, atMs}` with null for what was never answered, or null where they are closed. `atMs` is this page's own clock;
 * `asOfMs` says of when each part of `admin` is.
 */
export function readSnapshot(metricsText, models, admin, atMs) {
  const series = parse(metricsText);
  const cards = models.filter((card) => card.variant);
  const told = (name) => admin?.[name].value ?? null;
  const details = new Map((told("variants") ?? []).map((variant) => [variant.name, variant]));
  const weights = told("traffic")?.weights ?? null;
  return {
    atMs,
    model: models.find((card) => !card.variant)?.id ?? "",
    asOfMs: Object.fromEntries(Object.entries(admin ?? {}).map(([name, { atMs: at }]) => [name, at])),
    traffic: told("traffic"),
    rollouts: told("rollouts"),
    experiments: told("experiments"),
    variants: cards.map((card, index) => ({
      index,
      ...identity(card, details.get(card.variant)),
      weight: weights ? (weights[card.variant] ?? 0) : null,
      ...counted(series, (labels) => labels.variant === card.variant),
    })),
    refused: byLabel(series, BY_LABEL.errors, (labels) => labels.variant === ""),
  };
}

function identity(card, detail) {
  return {
    name: card.variant,
    id: card.id,
    precision: card.precision,
    state: card.state,
    reason: card.reason,
    contextLength: card.max_model_len,
    fingerprint: card.fingerprint,
    stage: detail?.stage ?? "",
    progress: detail?.progress ?? null,
    report: detail?.load_report ?? null,
  };
}

function counted(series, matches) {
  const facts = {};
  for (const [key, name] of Object.entries(HISTOGRAMS)) facts[key] = histogramOf(series, PREFIX + name, matches);
  for (const [key, name] of Object.entries(NUMBERS)) facts[key] = one(series, name, matches);
  for (const [key, source] of Object.entries(BY_LABEL)) facts[key] = byLabel(series, source, matches);
  return facts;
}

function one(series, name, matches) {
  return (series.get(PREFIX + name) ?? []).find((sample) => matches(sample.labels))?.value ?? NaN;
}

function byLabel(series, [name, label], matches) {
  const samples = (series.get(PREFIX + name) ?? []).filter((sample) => matches(sample.labels));
  return Object.fromEntries(samples.map((sample) => [sample.labels[label], sample.value]));
}
