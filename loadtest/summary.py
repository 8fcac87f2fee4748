"""From records to the numbers of a result. Pure: the same records give the same summary.

Every latency counts from when the request was due (see `record`). Latencies are those of requests that
succeeded; of an interrupted one the tokens that had arrived count too, and of a failed one nothing but its
failure, which the share of good requests (`goodput_ratio`) pays for. Rates count what arrived within the
measured window, whoever it belongs to, so that requests that began in the warm-up or ended after the window
bend nothing.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from loadtest.errors import Kind
from loadtest.record import Record
from loadtest.results import Json
from loadtest.settings import METRICS_WITH_LIMITS, Load, Settings
from loadtest.statistics import (
    Samples,
    corrected_for_omission,
    describe,
    mean_interval,
    percentiles,
    wilson,
)

MOST_SLICES = 60


@dataclass(frozen=True, slots=True)
class Window:
    """The measured part of a stage, in seconds after its start."""

    start_s: float
    end_s: float

    @property
    def length_s(self) -> float:
        return max(self.end_s - self.start_s, 1e-9)

    def holds(self, at_s: float) -> bool:
        return self.start_s <= at_s < self.end_s


def window_of(load: Load, records: Sequence[Record]) -> Window:
    """By duration: from the end of the warm-up for that long. By number: from the first request due to the
    last end.

    A run that was stopped early ends with the last thing that it saw.
    """
    measured = [record for record in records if not record.warmup]
    if not measured:
        return Window(0.0, 0.0)
    last_s = max(record.end_s for record in measured)
    if load.duration_s is not None:
        return Window(load.warmup_s, min(load.warmup_s + load.duration_s, last_s))
    return Window(min(record.scheduled_s for record in measured), last_s)


def is_good(record: Record, slo: dict[str, float]) -> bool:
    """Whether a request succeeded within every limit. A gap (itl_s) longer than its limit spoils its request."""
    return record.ok and all(value <= slo[name] for name, value in _limited(record).items() if name in slo)


def _limited(record: Record) -> dict[str, float]:
    """A request's own values of the metrics that may have a limit, those that it has."""
    values = {
        "ttft_s": record.ttft_s,
        "itl_s": max(record.gaps_s, default=None),
        "tpot_s": record.tpot_s,
        "e2e_s": record.e2e_s,
        "queue_s": record.queue_s,
    }
    assert values.keys() == set(METRICS_WITH_LIMITS)
    return {name: value for name, value in values.items() if value is not None}


def summarise(records: Iterable[Record], window: Window, settings: Settings) -> Json:
    """`{"overall": {...}, "by_variant": {NAME: the same}}`; a variant is what the server says answered."""
    everything = sorted(records, key=lambda record: (record.scheduled_s, record.index, record.turn))
    by_variant: dict[str, list[Record]] = defaultdict(list)
    for record in everything:
        if record.variant is not None:
            by_variant[record.variant].append(record)
    return {
        "overall": _group(everything, window, settings),
        "by_variant": {name: _group(group, window, settings) for name, group in sorted(by_variant.items())},
    }


def _group(records: Sequence[Record], window: Window, settings: Settings) -> Json:
    measured = [record for record in records if not record.warmup]
    judged = [record for record in measured if not record.interrupted]
    good = sum(is_good(record, settings.slo) for record in judged)
    failures = Counter(record.error for record in judged if record.error is not None)
    return {
        "requests": _outcomes(records, measured, judged),
        **_latencies(measured, settings.seed),
        **_rates(records, window, settings),
        "goodput_ratio": good / len(judged) if judged else None,
        "goodput_ratio_interval": wilson(good, len(judged)),
        "goodput_requests_per_s": good / window.length_s,
        "errors": dict(failures.most_common()),
        "error_ratio": sum(failures.values()) / len(judged) if judged else None,
        "error_examples": _examples(judged),
        **_tokens(measured),
    }


def _outcomes(records: Sequence[Record], measured: Sequence[Record], judged: Sequence[Record]) -> Json:
    return {
        "measured": len(measured),
        "succeeded": sum(record.ok for record in judged),
        "failed": sum(not record.ok for record in judged),
        "interrupted": len(measured) - len(judged),
        "warmup": len(records) - len(measured),
        "retried": sum(record.attempts > 1 for record in measured),
    }


def _latencies(measured: Sequence[Record], seed: int) -> Json:
    seen = [record for record in measured if record.ok or record.interrupted]

    def one(value: Callable[[Record], float | None]) -> Json:
        found = ((number,) if (number := value(record)) is not None else () for record in seen)
        return describe(Samples.of(list(found)), seed)

    return {
        "ttft_s": one(lambda record: record.ttft_s),
        "itl_s": describe(Samples.of([record.gaps_s for record in seen]), seed),
        "tpot_s": one(lambda record: record.tpot_s),
        "e2e_s": one(lambda record: record.e2e_s),
        "queue_s": one(lambda record: record.queue_s),
    }


def _rates(records: Sequence[Record], window: Window, settings: Settings) -> Json:
    slices = max(1, min(MOST_SLICES, math.floor(window.length_s)))
    edges = np.linspace(window.start_s, window.end_s, slices + 1)
    requests = np.histogram([record.end_s for record in records if record.ok], edges)[0]
    times, weights = _token_times(records)
    tokens = np.histogram(times, edges, weights=weights)[0]
    per_s = slices / window.length_s
    return {
        "window_s": window.length_s,
        "requests_per_s": float(requests.sum()) / window.length_s,
        "requests_per_s_interval": mean_interval(requests * per_s, settings.seed),
        "tokens_per_s": float(tokens.sum()) / window.length_s,
        "tokens_per_s_interval": mean_interval(tokens * per_s, settings.seed),
    }


def _token_times(records: Sequence[Record]) -> tuple[list[float], list[float]]:
    """When tokens arrived, and how many: a streamed answer's are spread evenly over its chunks."""
    times: list[float] = []
    weights: list[float] = []
    for record in records:
        arrived = record.chunks_s or ([record.end_s] if record.ok else [])
        times.extend(arrived)
        weights.extend([record.tokens / len(arrived)] * len(arrived) if arrived else [])
    return times, weights


def _tokens(measured: Sequence[Record]) -> Json:
    """How many tokens, who counted them, and how many came in one chunk."""
    done = [record for record in measured if record.ok]
    streamed = [record for record in done if record.chunks_s]
    chunks = sum(len(record.chunks_s) for record in streamed)
    counted = [record.prompt_tokens for record in done if record.prompt_tokens is not None]
    return {
        "prompt_tokens": {"total": sum(counted), "mean": sum(counted) / len(counted) if counted else None},
        "completion_tokens": {
            "total": sum(record.tokens for record in done),
            "mean": sum(record.tokens for record in done) / len(done) if done else None,
        },
        "tokens_counted_by": dict(Counter(_counted_by(record) for record in done)),
        "tokens_per_chunk": sum(record.tokens for record in streamed) / chunks if chunks else None,
        "tokenizer_check": _tokenizer_check(done),
    }


def _counted_by(record: Record) -> str:
    if record.usage_tokens is not None:
        return "usage"
    return "chunks" if record.tokenizer_tokens is None else "tokenizer"


def _tokenizer_check(done: Sequence[Record]) -> Json | None:
    """The server's count of answer tokens beside a tokenizer's. One apart is the end-of-text token, which has
    no text.
    """
    both = [
        (record.usage_tokens, record.tokenizer_tokens)
        for record in done
        if record.usage_tokens is not None and record.tokenizer_tokens is not None
    ]
    if not both:
        return None
    usage, counted = sum(pair[0] for pair in both), sum(pair[1] for pair in both)
    return {
        "requests": len(both),
        "usage_tokens": usage,
        "tokenizer_tokens": counted,
        "ratio": usage / counted if counted else None,
        "requests_more_than_one_apart": sum(abs(pair[0] - pair[1]) > 1 for pair in both),
    }


def _examples(judged: Sequence[Record]) -> dict[str, str]:
    """One message of each kind of failure."""
    found: dict[str, str] = {}
    for record in judged:
        if record.error is not None and record.error != Kind.INTERRUPTED:
            found.setdefault(record.error, record.error_detail)
    return found


def coordinated_omission(records: Sequence[Record], load: Load) -> Json:
    """What a generator that waits for the server would have said, beside the truth; or, of a closed loop, the
    reverse.
    """
    done = [record for record in records if record.ok and not record.warmup]
    if load.is_open:
        late = [(value,) for record in done if (value := record.from_sent_s) is not None]
        naive = describe(Samples.of(late))
        del naive["histogram"], naive["intervals"]
        return {
            "loop": "open",
            "note": "latencies count from the scheduled arrival; e2e_from_sent_s counts from the send",
            "e2e_from_sent_s": naive,
        }
    values_s = np.asarray([record.e2e_s for record in done if record.e2e_s is not None], dtype=np.float64)
    corrected: Json | None = None
    if values_s.size:
        counts = corrected_for_omission(values_s, float(np.median(values_s)))
        corrected = percentiles(counts)
    return {
        "loop": "closed",
        "note": "a closed loop sends less while the server stalls, so its tail is too good; e2e_corrected_s "
        "estimates what steady arrivals would have met. Measure the tail with an open loop (--rate)",
        "e2e_corrected_s": corrected,
    }
