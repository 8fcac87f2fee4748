"""What one request leaves behind, and the parcel of such records that an ingress sends to the controller.

A record exists from the moment a request is assigned. Until the request ends it is *open* (`finished_at_s is None`),
and an open record travels too: a variant that hangs never finishes anything, so only its open records, growing older
than the deadline, speak against it. The judge decides what counts; a record only states facts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from serve.rollout.split import Route
from serve.rollout.strict import check_keys

__all__ = ["Batch", "Drift", "Outcome"]


@dataclass(frozen=True)
class Drift:
    """How far one answer lay from the reference's view of it, over `tokens` scored positions (KL in nats per token).

    `nll_ratio_tokens` counts the positions where a perplexity ratio is fair (prompt tokens, or text that the stable
    variant served); the two sums are over those. `kl_p50`, `kl_p99`: over tokens. `delta_p_mean`: the variant's
    probability of the served token minus the reference's. `first_divergence`: the first answer token where the
    likeliest tokens differ (None: nowhere). `flipped`: the reference's whole greedy answer differs (None:
    unknown).
    """

    tokens: int
    kl_mean: float
    kl_max: float
    top1_agreements: int
    nonfinite_tokens: int = 0
    nll_variant_nats: float = 0.0
    nll_reference_nats: float = 0.0
    nll_ratio_tokens: int = 0
    flipped: bool | None = None
    kl_p50: float = 0.0
    kl_p99: float = 0.0
    delta_p_mean: float = 0.0
    first_divergence: int | None = None

    @property
    def top1_agreement(self) -> float:
        return self.top1_agreements / self.tokens if self.tokens else 1.0


@dataclass(frozen=True)
class Outcome:
    """One request on one variant. Times in seconds on the ingress's wall clock; never a prompt, a user or an address.

    record: number of the record at its ingress; an open record and its end share it, so that the end replaces it and a
        parcel sent twice counts once.
    unit: hash of the sticky key (`unit_hash`), None for anonymous traffic, which is judged by time blocks.
    error: None, or a short kind such as "timeout", "replica_died", "overloaded", "internal", "nan", "oom".
    client_fault: a 4xx, or a client that went away: says nothing about the variant.
    itl_mean_s, itl_max_s: gaps between tokens; None below two tokens.
    tpot_s: (E2E - TTFT) / (tokens - 1), the mean over the call's choices; None below two tokens.
    running_sequences: sequences running on the variant when this one was assigned (its load).
    warm_up: sent to warm the variant, or served by a replica that had just started.
    shadow: mirrored; `pair` then is the record number of the request it mirrors (same ingress).
    looping: the answer repeats itself to its end.
    empty: it ended well, and there is nothing to read in it although something was asked for.
    agreed_tokens: of a shadow: how many tokens of the served answer it repeats before the first that differs.
    reading: of an answer that the reference served: how another variant, `read_by`, reads the same text. It is that
        variant's drift, on text that no compressed variant has sampled.
    """

    record: int
    variant: str
    route: Route
    revision: int
    assigned_at_s: float
    unit: str | None = None
    finished_at_s: float | None = None
    error: str | None = None
    client_fault: bool = False
    finish_reason: str | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0
    ttft_s: float | None = None
    itl_mean_s: float | None = None
    itl_max_s: float | None = None
    tpot_s: float | None = None
    e2e_s: float | None = None
    running_sequences: int = 0
    warm_up: bool = False
    held_out: bool = False
    shadow: bool = False
    pair: int | None = None
    looping: bool = False
    drift: Drift | None = None
    empty: bool = False
    agreed_tokens: int | None = None
    read_by: str | None = None
    reading: Drift | None = None

    @property
    def is_open(self) -> bool:
        return self.finished_at_s is None

    @property
    def ok(self) -> bool:
        """It ended, and well."""
        return not self.is_open and self.error is None

    def drift_of(self, variant: str) -> Drift | None:
        """What this answer says about a variant: its own answer's drift, or how it read the reference's."""
        if variant == self.variant:
            return self.drift
        return self.reading if variant == self.read_by else None

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; what equals its default is left out."""
        return {key: value for key, value in asdict(self).items() if value != _DEFAULTS.get(key, _REQUIRED)}

    @classmethod
    def from_dict(cls, mapping: Mapping[str, Any]) -> Outcome:
        values = check_keys("outcome", mapping, cls)
        for key in ("drift", "reading"):
            if drift := values.get(key):
                values[key] = Drift(**check_keys(f"outcome.{key}", drift, Drift))
        return cls(**values)


_REQUIRED = object()
_DEFAULTS = {field.name: field.default for field in fields(Outcome)}


@dataclass(frozen=True)
class Batch:
    """What an ingress sends about once a second; the controller answers with the split in force.

    ingress: name of the sender, new at every start, so that (ingress, record) names a request for good.
    sequence: 1, 2, 3 ...; a parcel that comes twice or late is recognised by it.
    outcomes: all records that were opened or changed since the last parcel that was answered.
    lost: records dropped since the start because the buffer was full, by variant: they are missing, never assumed good.
    """

    ingress: str
    sequence: int
    sent_at_s: float
    outcomes: tuple[Outcome, ...] = ()
    lost: Mapping[str, int] | None = None

    def to_dict(self) -> dict[str, Any]:
        return {
            "ingress": self.ingress,
            "sequence": self.sequence,
            "sent_at_s": self.sent_at_s,
            "outcomes": [outcome.to_dict() for outcome in self.outcomes],
            "lost": dict(self.lost or {}),
        }

    @classmethod
    def from_dict(cls, mapping: Mapping[str, Any]) -> Batch:
        values = check_keys("batch", mapping, cls)
        outcomes = tuple(Outcome.from_dict(outcome) for outcome in values.pop("outcomes", ()))
        return cls(**values, outcomes=outcomes)
