"""A stage second by second, over its whole length: what was offered, what came back, how long it took."""

import math
from collections.abc import Sequence

import numpy as np

from loadtest.record import Record
from loadtest.results import Json
from loadtest.statistics import Floats

MOST_SLICES = 600


def timeline(records: Sequence[Record]) -> Json:
    """Columns of equal length, one entry for each slice that starts at `start_s`; None where nothing was
    measured.

    Latencies stand in the slice in which their request was due: a stall shows at the requests that met it.
    """
    if not records:
        return {"slice_s": 1.0, "start_s": []}
    length_s = max(record.end_s for record in records)
    slice_s = float(max(1, math.ceil(length_s / MOST_SLICES)))
    count = max(1, math.ceil(length_s / slice_s + 1e-9))
    edges: Floats = np.arange(count + 1, dtype=np.float64) * slice_s

    def per_s(times: Sequence[float]) -> list[float]:
        return [round(float(value), 4) for value in np.histogram(times, edges)[0] / slice_s]

    done = [record for record in records if record.ok]
    failed = [record for record in records if not record.ok and not record.interrupted]
    return {
        "slice_s": slice_s,
        "start_s": [float(edge) for edge in edges[:-1]],
        "due_per_s": per_s([record.scheduled_s for record in records]),
        "sent_per_s": per_s([record.sent_s for record in records if record.sent_s is not None]),
        "completed_per_s": per_s([record.end_s for record in done]),
        "failed_per_s": per_s([record.end_s for record in failed]),
        "chunks_per_s": per_s([at_s for record in records for at_s in record.chunks_s]),
        "in_flight": _in_flight(records, edges),
        "ttft_p50_s": _percentile([(r.scheduled_s, r.ttft_s) for r in done], edges, 50),
        "ttft_p99_s": _percentile([(r.scheduled_s, r.ttft_s) for r in done], edges, 99),
        "e2e_p50_s": _percentile([(r.scheduled_s, r.e2e_s) for r in done], edges, 50),
        "e2e_p99_s": _percentile([(r.scheduled_s, r.e2e_s) for r in done], edges, 99),
    }


def _in_flight(records: Sequence[Record], edges: Floats) -> list[int]:
    """Requests due and not yet answered at the end of each slice."""
    due = np.sort([record.scheduled_s for record in records])
    ended = np.sort([record.end_s for record in records])
    return [int(np.searchsorted(due, edge) - np.searchsorted(ended, edge)) for edge in edges[1:]]


def _percentile(
    pairs: Sequence[tuple[float, float | None]],
    edges: Floats,
    percentile: float,
) -> list[float | None]:
    known = [(at_s, value) for at_s, value in pairs if value is not None]
    slices = np.searchsorted(edges, [at_s for at_s, _ in known], side="right") - 1
    values = np.asarray([value for _, value in known])
    found: list[float | None] = []
    for number in range(edges.size - 1):
        inside = values[slices == number] if values.size else values
        found.append(round(float(np.percentile(inside, percentile)), 6) if inside.size else None)
    return found
