"""Every metric of the server, declared once, and the exact arithmetic that brings them together.

Each process counts in a `Recorder` and sends its whole `Snapshot` to the controller, again and again; a `Ledger` there
adds them up. What a process sends is cumulative, so a message lost or sent twice changes nothing, and the totals of a
process that died stay: no counter falls. Ray's own pipeline is not used: it rebuilds histogram sums from bucket
midpoints and forgets a gauge that was set once.

Latencies are taken at the ingress, from the moment a request is received, as a client would see them. Names follow
vLLM's. Label values come from the configuration and from our own code, never from a client.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.registry import Collector

__all__ = ["METRICS", "Ledger", "Metric", "Recorder", "Snapshot", "VariantLabels"]

_PREFIX = "halftone_"
_VARIANT = ("model_name", "variant", "precision")
_TOKEN_S = (
    0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.0075, 0.01, 0.015, 0.025, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5, 5.0,
)  # fmt: skip
_FIRST_S = (0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.15, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0)
_NATS = (
    0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0,
)  # fmt: skip
_REQUEST_S = (0.025, 0.05, 0.1, 0.25, 0.5, 0.75, 1.0, 1.5, 2.5, 5.0, 10.0, 20.0, 30.0, 60.0, 120.0, 300.0, 600.0)

Kind = Literal["counter", "gauge", "histogram"]
Merge = Literal["sum", "max"]


@dataclass(frozen=True)
class Metric:
    """One name. `extra` are labels beside the variant's three; `merge` says what several processes' gauges make.
    `values` of a counter's one extra label are known beforehand: each begins at zero, so that a rate sees the first."""

    name: str
    kind: Kind
    help: str
    extra: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()
    merge: Merge = "sum"
    values: tuple[str, ...] = ()

    @property
    def labels(self) -> tuple[str, ...]:
        return (*_VARIANT, *self.extra)


@dataclass(frozen=True)
class VariantLabels:
    """Who a number is about."""

    model_name: str
    variant: str
    precision: str

    @property
    def values(self) -> tuple[str, str, str]:
        return (self.model_name, self.variant, self.precision)


TTFT = Metric("time_to_first_token_seconds", "histogram", "Received to first token", buckets=_FIRST_S)
ITL = Metric("inter_token_latency_seconds", "histogram", "Gap between two tokens of one choice", buckets=_TOKEN_S)
TPOT = Metric(
    "request_time_per_output_token_seconds", "histogram", "(E2E - TTFT) / (tokens - 1) of one choice", buckets=_TOKEN_S
)
E2E = Metric("e2e_request_latency_seconds", "histogram", "Received to last token", buckets=_REQUEST_S)
QUEUE = Metric("request_queue_time_seconds", "histogram", "Submitted to first scheduled", buckets=_FIRST_S)
RUNNING = Metric("num_requests_running", "gauge", "Sequences that the engine runs")
WAITING = Metric("num_requests_waiting", "gauge", "Sequences that wait for the engine")
KV_USAGE = Metric("kv_cache_usage_ratio", "gauge", "Used share of the KV blocks, of the fullest replica", merge="max")
PROMPT_TOKENS = Metric("prompt_tokens_total", "counter", "Prompt tokens taken in")
GENERATION_TOKENS = Metric("generation_tokens_total", "counter", "Tokens made for clients")
SUCCESS = Metric(
    "request_success_total",
    "counter",
    "Choices that ended, by reason",
    extra=("finished_reason",),
    values=("stop", "length", "abort"),
)
ERRORS = Metric(
    "request_errors_total",
    "counter",
    "Requests that failed, by error code; variant is empty where none was found",
    extra=("code",),
    values=(
        "overloaded", "variant_unavailable", "generation_failed", "output_not_finite", "out_of_memory",
        "internal_error", "context_length_exceeded", "invalid_request",
    ),
)  # fmt: skip
PREEMPTIONS = Metric("num_preemptions_total", "counter", "Sequences put back because blocks ran out")
PREFIX_QUERIES = Metric("prefix_cache_queries_total", "counter", "Prompt tokens looked up in the prefix cache")
PREFIX_HITS = Metric("prefix_cache_hits_total", "counter", "Prompt tokens found in the prefix cache")
MEMORY = Metric("memory_bytes", "gauge", "Bytes by component; docs/OPERATIONS.md adds them up", extra=("component",))
MEMORY_USED = Metric(
    "memory_used_ratio",
    "gauge",
    "Used share, by whomever, of the memory that the fullest replica is limited to: GPU, container or machine",
    merge="max",
)
PEAK_LOAD = Metric("memory_peak_load_bytes", "gauge", "Highest resident bytes while loading", merge="max")
BITS = Metric("model_bits_per_weight", "gauge", "Stored bits per weight of the compressed layers", merge="max")
COMPRESSION = Metric("compression_ratio", "gauge", "Bytes at 16 bit over stored bytes", merge="max")
LOAD = Metric("load_seconds", "gauge", "Seconds to load, by stage", extra=("stage",), merge="max")
REPLICAS = Metric("replicas", "gauge", "Replicas by state", extra=("state",))
TRAFFIC_WEIGHT = Metric("traffic_weight_ratio", "gauge", "Share of routed requests in force", merge="max")
DRIFT_KL = Metric("drift_kl_divergence_nats", "histogram", "KL(reference || variant) of a scored token", buckets=_NATS)
DRIFT_GUARD = Metric("drift_kl_divergence_guard_nats", "gauge", "Mean KL up to which the variant is within its guard")
DRIFT_TOKENS = Metric("drift_tokens_total", "counter", "Tokens scored again on the reference")
DRIFT_AGREEMENTS = Metric("drift_top1_agreements_total", "counter", "Scored tokens with the same first choice")
DRIFT_NONFINITE = Metric("drift_nonfinite_tokens_total", "counter", "Tokens left out: a logit was not a number")
DRIFT_NLL_TOKENS = Metric("drift_nll_tokens_total", "counter", "Tokens where a perplexity ratio is fair")
DRIFT_NLL_VARIANT = Metric("drift_nll_variant_nats_total", "counter", "Their negative log likelihood by the variant")
DRIFT_NLL_REFERENCE = Metric("drift_nll_reference_nats_total", "counter", "The same by the reference")
DRIFT_SAMPLES = Metric(
    "drift_samples_total",
    "counter",
    "Requests sampled for scoring, by result",
    extra=("result",),
    values=("scored", "shed", "no_data", "unfinished", "failed"),
)
SHADOW = Metric(
    "shadow_requests_total",
    "counter",
    "Requests mirrored to the variant, by result",
    extra=("result",),
    values=("compared", "failed", "timeout", "shed", "unavailable"),
)
ENERGY = Metric("energy_joules_total", "counter", "Energy taken while the variant generated; absent: unavailable")
ENERGY_TOKENS = Metric("energy_tokens_total", "counter", "Tokens generated, mirrored ones too, while it was measured")
CO2 = Metric(
    "energy_co2_grams_per_kwh", "gauge", "Stated intensity of the electricity; absent: not stated", merge="max"
)
ROLLOUT_PHASE = Metric("rollout_phase", "gauge", "1 for the phase that the canary's rollout is in", extra=("phase",))
ROLLOUT_VERDICTS = Metric("rollout_verdicts_total", "counter", "Verdicts on the canary", extra=("verdict",))

METRICS: tuple[Metric, ...] = (
    TTFT, ITL, TPOT, E2E, QUEUE, RUNNING, WAITING, KV_USAGE, PROMPT_TOKENS, GENERATION_TOKENS, SUCCESS, ERRORS,
    PREEMPTIONS, PREFIX_QUERIES, PREFIX_HITS, MEMORY, MEMORY_USED, PEAK_LOAD, BITS, COMPRESSION, LOAD, REPLICAS,
    TRAFFIC_WEIGHT, DRIFT_KL, DRIFT_GUARD, DRIFT_TOKENS, DRIFT_AGREEMENTS, DRIFT_NONFINITE, DRIFT_NLL_TOKENS,
    DRIFT_NLL_VARIANT, DRIFT_NLL_REFERENCE, DRIFT_SAMPLES, SHADOW, ENERGY, ENERGY_TOKENS, CO2,
    ROLLOUT_PHASE, ROLLOUT_VERDICTS,
)  # fmt: skip


@dataclass
class Histogram:
    """Counts per bucket (the last one is +Inf, not cumulative) and the exact sum."""

    counts: list[int]
    total: float = 0.0

    def plus(self, other: Histogram) -> Histogram:
        return Histogram([a + b for a, b in zip(self.counts, other.counts, strict=True)], self.total + other.total)


Series = tuple[str, tuple[str, ...]]
"""A metric's name without the prefix, and its label values in the declared order."""


@dataclass
class Snapshot:
    """All that one process has counted since it started. Plain numbers, cheap to send."""

    values: dict[Series, float] = field(default_factory=dict)
    histograms: dict[Series, Histogram] = field(default_factory=dict)


class Recorder:
    """What one process counts. Not thread-safe: one event loop records."""

    def __init__(self) -> None:
        self._snapshot = Snapshot()
        self._followed: dict[Series, float] = {}

    def add(self, metric: Metric, labels: VariantLabels, value: float = 1.0, *extra: str) -> None:
        series = _series(metric, labels, extra)
        self._snapshot.values[series] = self._snapshot.values.get(series, 0.0) + value

    def set(self, metric: Metric, labels: VariantLabels, value: float, *extra: str) -> None:
        """A gauge, or a counter of something that lives as long as this process."""
        self._snapshot.values[_series(metric, labels, extra)] = float(value)

    def follow(self, metric: Metric, labels: VariantLabels, total: float) -> None:
        """A counter that something else counts, and that may begin anew: it grows by what that grew."""
        series = _series(metric, labels, ())
        before, self._followed[series] = self._followed.get(series, 0.0), total
        self.add(metric, labels, total - before if total >= before else total)

    def observe(self, metric: Metric, labels: VariantLabels, value: float, count: int = 1) -> None:
        histogram = self._histogram(metric, labels)
        histogram.counts[bisect_left(metric.buckets, value)] += count
        histogram.total += value * count

    def declare(self, labels: VariantLabels, metrics: Iterable[Metric]) -> None:
        """Begin at zero, so that a rate sees the first event."""
        for metric in metrics:
            if metric.kind == "histogram":
                self._histogram(metric, labels)
            elif not metric.extra:
                self.add(metric, labels, 0.0)
            for value in metric.values:
                self.add(metric, labels, 0.0, value)

    def snapshot(self) -> Snapshot:
        """A copy: counting goes on."""
        histograms = {key: Histogram(list(h.counts), h.total) for key, h in self._snapshot.histograms.items()}
        return Snapshot(dict(self._snapshot.values), histograms)

    def _histogram(self, metric: Metric, labels: VariantLabels) -> Histogram:
        empty = Histogram([0] * (len(metric.buckets) + 1))
        return self._snapshot.histograms.setdefault(_series(metric, labels, ()), empty)


_REMEMBERED_DEAD = 64


class Ledger:
    """The sum over all processes, living and dead. A process is known by a name that is new at every start."""

    def __init__(self) -> None:
        self._living: dict[str, Snapshot] = {}
        self._dead: dict[str, Snapshot] = {}
        self._before = Snapshot()

    def update(self, process: str, snapshot: Snapshot) -> None:
        """The newest word of a process, which may be one that was thought dead."""
        self._dead.pop(process, None)
        self._living[process] = snapshot

    def retire(self, process: str) -> None:
        """It died: its counters stay, its gauges go."""
        if (snapshot := self._living.pop(process, None)) is not None:
            self._dead[process] = _counters(snapshot)
        while len(self._dead) > _REMEMBERED_DEAD:
            self._before = _sum([self._before, self._dead.pop(next(iter(self._dead)))])

    def value(self, metric: Metric, labels: VariantLabels) -> float | None:
        """One counter over all processes; None where nobody counts it."""
        series = _series(metric, labels, ())
        told = [self._before, *self._dead.values(), *self._living.values()]
        counts = [snapshot.values[series] for snapshot in told if series in snapshot.values]
        return sum(counts) if counts else None

    def total(self) -> Snapshot:
        return _sum([self._before, *self._dead.values(), *self._living.values()])

    def render(self, *beside: Snapshot) -> str:
        """Prometheus text, version 0.0.4. `beside`: further snapshots that nobody keeps."""
        registry = CollectorRegistry(auto_describe=False)
        registry.register(_Families(_sum([self.total(), *beside])))
        return generate_latest(registry).decode()


class _Families(Collector):
    """A snapshot as prometheus_client's metric families, in the declared order."""

    def __init__(self, snapshot: Snapshot) -> None:
        self._snapshot = snapshot

    def collect(self) -> Iterator[CounterMetricFamily | GaugeMetricFamily | HistogramMetricFamily]:
        for metric in METRICS:
            yield _histogram_family(metric, self._snapshot) if metric.buckets else _value_family(metric, self._snapshot)


def _value_family(metric: Metric, snapshot: Snapshot) -> CounterMetricFamily | GaugeMetricFamily:
    family = CounterMetricFamily if metric.kind == "counter" else GaugeMetricFamily
    built = family(_PREFIX + metric.name, metric.help, labels=metric.labels)
    for (name, labels), value in sorted(snapshot.values.items()):
        if name == metric.name:
            built.add_metric(labels, value)
    return built


def _histogram_family(metric: Metric, snapshot: Snapshot) -> HistogramMetricFamily:
    built = HistogramMetricFamily(_PREFIX + metric.name, metric.help, labels=metric.labels)
    for (name, labels), histogram in sorted(snapshot.histograms.items(), key=lambda item: item[0]):
        if name == metric.name:
            built.add_metric(labels, _cumulative(metric, histogram), histogram.total)
    return built


def _cumulative(metric: Metric, histogram: Histogram) -> list[tuple[str, float]]:
    edges = [*(str(float(edge)) for edge in metric.buckets), "+Inf"]
    return [(edge, sum(histogram.counts[: index + 1])) for index, edge in enumerate(edges)]


def _series(metric: Metric, labels: VariantLabels, extra: tuple[str, ...]) -> Series:
    assert len(extra) == len(metric.extra), f"{metric.name} takes the labels {metric.labels}"
    return metric.name, (*labels.values, *extra)


_BY_NAME: Mapping[str, Metric] = {metric.name: metric for metric in METRICS}


def _counters(snapshot: Snapshot) -> Snapshot:
    kept = {series: value for series, value in snapshot.values.items() if _BY_NAME[series[0]].kind == "counter"}
    return Snapshot(kept, snapshot.histograms)


def _sum(snapshots: Iterable[Snapshot]) -> Snapshot:
    total = Snapshot()
    for snapshot in snapshots:
        for series, value in snapshot.values.items():
            combine = max if _BY_NAME[series[0]].merge == "max" else float.__add__
            total.values[series] = combine(total.values[series], value) if series in total.values else value
        for series, histogram in snapshot.histograms.items():
            before = total.histograms.get(series)
            total.histograms[series] = before.plus(histogram) if before else histogram
    return total
