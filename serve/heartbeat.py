"""What the processes tell one another about once a second: replicas and ingresses report, the controller answers.

Everything here is a plain frozen value. Reports are cumulative, so one that is lost is made good by the next.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from serve.metrics import Snapshot
from serve.place import Place
from serve.rollout import Batch, Split

__all__ = ["IngressBeat", "Orders", "ReplicaBeat", "State", "VariantState", "View", "serving"]

State = Literal["loading", "ready", "failed", "freed"]
"""Of a variant: "freed" has given its memory back after a rollout, and loads again when it is to be had."""


@dataclass(frozen=True)
class ReplicaBeat:
    """One replica about itself. `process` is new at every start; `leaving` is its last word."""

    process: str
    variant: str
    state: State
    stage: str = ""
    """What it is doing while it loads, for the terminal."""
    progress: float = 0.0
    reason: str | None = None
    """Why it failed."""
    context_length: int | None = None
    fingerprint: str | None = None
    head: str | None = None
    """Digest of its output head: who shares it can read its hidden states. None: only logits will do."""
    waiting: int = 0
    """Sequences that wait for the engine, and did at the last report: a queue, not an arrival."""
    report: Mapping[str, Any] | None = None
    """How it was loaded; sent once, and again when the controller asks."""
    memory: Mapping[str, int] = field(default_factory=dict)
    """Resident bytes by component, now."""
    needs: Mapping[str, int] = field(default_factory=dict)
    """What the model itself takes, or took until it was freed, by component."""
    available_bytes: int | None = None
    """What is still free where it runs: of the machine, or of its GPU."""
    energy: str = ""
    """What of its energy is measured and how; or "unavailable: ..." and why."""
    snapshot: Snapshot = field(default_factory=Snapshot)
    leaving: bool = False
    place: Place | None = None
    """Where it runs: a controller beside it sees its death before its silence."""


@dataclass(frozen=True)
class Orders:
    """The answer to a replica's beat. report_wanted: send the load report again. resident: be loaded, or free the
    memory."""

    report_wanted: bool = False
    resident: bool = True


@dataclass(frozen=True)
class IngressBeat:
    """One ingress: what its requests left behind, and the split it knows, which a new controller may have forgotten."""

    process: str
    batch: Batch
    snapshot: Snapshot
    split: Split | None = None
    deaths: Mapping[str, int] = field(default_factory=dict)
    """Times that a replica broke under a request, by variant, since the ingress started."""


@dataclass(frozen=True)
class VariantState:
    """One variant as all its replicas make it: ready if one of them is."""

    name: str
    precision: str
    state: State = "loading"
    stage: str = ""
    progress: float = 0.0
    reason: str | None = None
    context_length: int | None = None
    fingerprint: str | None = None
    ready_replicas: int = 0
    head: str | None = None
    waiting: int = 0
    is_cold: bool = False
    """One of its replicas has just started: what it serves now is no evidence."""

    @property
    def is_heard(self) -> bool:
        """Some replica has spoken for it."""
        return self.state != "loading" or bool(self.stage)


@dataclass(frozen=True)
class View:
    """What the controller knows, whole: an ingress needs nothing else to route."""

    split: Split
    variants: tuple[VariantState, ...]
    counted: bool = True
    """The batch of the beat that this answers is in safe hands; otherwise its records are sent again."""
    is_young: bool = False
    """The controller has just started: it may not have heard of everybody yet."""

    @property
    def settled(self) -> bool:
        """Every variant has loaded or failed."""
        return all(variant.state != "loading" for variant in self.variants)

    @property
    def users_wait(self) -> bool:
        """For the engine of some variant: whatever serves no user gives way."""
        return any(variant.waiting for variant in self.variants)

    def serving(self) -> Split | None:
        return serving(self.split, {variant.name for variant in self.variants if variant.state == "ready"})


def serving(split: Split, ready: set[str]) -> Split | None:
    """The split as it can be dealt right now; None if nobody who should get traffic is ready.

    The weight of an absent variant falls to the stable one, so that nobody else's users move. Without the stable one
    the rest divide all traffic in proportion, and the heaviest stands in for it. A weight of zero never serves.
    """
    if all(name in ready for name, weight in split.weights.items() if weight):
        return split
    weights = {name: weight if name in ready else 0.0 for name, weight in split.weights.items()}
    present = math.fsum(weights.values())
    if split.stable in ready:
        return replace(split, weights={**weights, split.stable: 100.0 - (present - weights[split.stable])})
    if not present:
        return None
    heaviest = max(weights, key=weights.__getitem__)
    canary = None if split.canary == heaviest else split.canary
    dealt = {name: min(100.0, 100.0 * weight / present) for name, weight in weights.items()}
    return replace(split, stable=heaviest, canary=canary, weights=dealt)
