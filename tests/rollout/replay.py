"""From simulated arrays to the records that an ingress would send, for one rollout."""

from __future__ import annotations

from collections.abc import Iterable

from serve.rollout import Batch, Drift, Outcome
from tests.rollout.simulation import Arrivals


def outcomes(arrivals: Iterable[Arrivals], *, rollout: int = 0, sticky: bool = True) -> list[Outcome]:
    """The records of one simulated rollout in the order of assignment; step k ran under split revision k + 1."""
    return [_outcome(record, a, rollout, sticky) for record, a in enumerate(arrivals, start=1)]


def parcels(records: list[Outcome], size: int = 50, ingress: str = "ingress") -> list[Batch]:
    return [
        Batch(
            ingress,
            1 + start // size,
            records[start : start + size][-1].assigned_at_s,
            tuple(records[start : start + size]),
        )
        for start in range(0, len(records), size)
    ]


def _outcome(record: int, a: Arrivals, r: int, sticky: bool) -> Outcome:
    failed = bool(a.failed[r])
    kl = float(a.kl_nats[r])
    tokens = 10**9  # so that the share of agreements is exact
    scored = Drift(tokens, kl, kl, round(tokens * float(a.top1[r])), flipped=bool(a.flipped[r])) if kl == kl else None
    return Outcome(
        record=record,
        variant="int8" if a.arm[r] else "bf16",
        route="canary" if a.arm[r] else "sticky",
        revision=a.step + 1,
        assigned_at_s=float(a.time_s[r]),
        unit=f"{int(a.user[r]):016x}" if sticky else None,
        finished_at_s=float(a.time_s[r] + a.e2e_s[r]),
        error="internal" if failed else None,
        prompt_tokens=int(a.prompt_tokens[r]),
        completion_tokens=int(a.completion_tokens[r]),
        ttft_s=float(a.ttft_s[r]),
        itl_mean_s=float(a.itl_s[r]),
        e2e_s=float(a.e2e_s[r]),
        running_sequences=int(a.running[r]),
        drift=scored,
    )
