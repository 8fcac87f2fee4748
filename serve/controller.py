"""The one place that knows every process: it holds the split, merges what the others report and answers with the view.

Nothing waits for it. If it is gone, ingresses go on with the last split and replicas go on serving; a new one learns
the states from the next reports and the split from the ingresses. It knows neither models nor HTTP, and its clock is
given to it: one that never jumps, for it only measures silence. Rollouts live beside it (`serve.progression`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, get_args

from serve import metrics
from serve.carbon import co2_grams_per_million
from serve.config import Config
from serve.errors import ConfigError
from serve.heartbeat import IngressBeat, Orders, ReplicaBeat, State, VariantState, View
from serve.metrics import Ledger, Recorder, Snapshot, VariantLabels
from serve.office import Scene
from serve.place import has_died
from serve.rollout import Split, kl_guard_nats
from serve.room import room_for

__all__ = ["Controller"]

_SILENT_S = 15.0
"""A process that has said nothing for so long is taken for dead."""
_LATE_S = 1.2
"""A beat that has not come by then is worth a look at the process."""
_COLD_S = 5.0
"""So long after it has loaded, a replica's latency says little."""
_YOUNG_S = 5.0
"""Several times longer than a process takes to report to a new controller."""


@dataclass(frozen=True)
class _Heard:
    """The last word of a replica, when it came, and since when it is known to be ready."""

    beat: ReplicaBeat
    at_s: float
    ready_since_s: float


@dataclass(frozen=True)
class _Seen:
    """An ingress: when it spoke last and in which beat, the split that it deals by, the deaths that it has told of."""

    at_s: float
    sequence: int
    revision: int
    deaths: Mapping[str, int]


class Controller:
    """Merges reports, deals traffic. Every method is short and synchronous: one event loop, no locks."""

    def __init__(self, config: Config, clock: Callable[[], float] = time.monotonic) -> None:
        self._config = config
        self._clock = clock
        self._since_s = clock()
        self._split = config.split
        self._replicas: dict[str, _Heard] = {}
        self._ingresses: dict[str, _Seen] = {}
        self._reports: dict[str, Mapping[str, Any]] = {}
        self._ledger = Ledger()
        self._freed: frozenset[str] = frozenset()
        self._told_of_death: list[Callable[[str], None]] = []

    def replica(self, beat: ReplicaBeat) -> Orders:
        """Take a replica's report and tell it what it is to do."""
        self._ledger.update(beat.process, beat.snapshot)
        if beat.report is not None:
            self._reports[beat.variant] = beat.report
        if beat.leaving:
            self._forget(beat.process)
            return Orders()
        self._replicas[beat.process] = _Heard(beat, self._clock(), self._ready_since(beat))
        self._sweep()
        wanted = beat.state == "ready" and beat.variant not in self._reports
        return Orders(wanted, resident=beat.variant not in self._freed)

    def ingress(self, beat: IngressBeat) -> View:
        """Take an ingress's report and answer with the view. A newer split than ours is one that we have forgotten."""
        before = self._ingresses.get(beat.process)
        if before and beat.batch.sequence < before.sequence:
            return self.view()  # overtaken on its way: what it says is known already, and counts must not fall
        revision = beat.split.revision if beat.split else -1
        self._ingresses[beat.process] = _Seen(self._clock(), beat.batch.sequence, revision, beat.deaths)
        self._ledger.update(beat.process, beat.snapshot)
        for variant, count in beat.deaths.items():
            if before and count > before.deaths.get(variant, 0):
                self._witnessed(variant)
        if beat.split and beat.split.revision > self._split.revision and self._knows(beat.split):
            self._split = beat.split
        return self.view()

    def view(self) -> View:
        self._sweep()
        states = tuple(self._state(v.name, v.precision) for v in self._config.variants)
        return View(self._split, states, is_young=self._is_young)

    def set_traffic(self, weights: Mapping[str, float], shadow: Mapping[str, float] | None = None) -> View:
        """Deal traffic anew: one revision more, and nothing restarts. Raises ConfigError by the key's path.

        shadow: None leaves it as it is.
        """
        names = [variant.name for variant in self._config.variants]
        for key, given in (("weights", weights), ("shadow", shadow or {})):
            for name in given:
                if name not in names:
                    raise ConfigError(f"traffic.{key}.{name}", f"unknown variant; allowed: {', '.join(names)}")
        moved = self._split.moved(weights)
        self._split = moved if shadow is None else replace(moved, shadow=dict(shadow))
        return self.view()

    @property
    def split(self) -> Split:
        return self._split

    def deal(self, split: Split) -> None:
        """Put a rollout's split in force, unless a newer one is."""
        if split.revision > self._split.revision and self._knows(split):
            self._split = split

    def free(self, variants: frozenset[str]) -> None:
        """These give their memory back, all others have theirs; the replicas learn it with their next beat."""
        self._freed = variants

    def room_for(self, canary: str) -> str:
        """Whether there is memory for it beside the stable variant: the arithmetic, or a Conflict with it."""
        return room_for(canary, self._split.stable, [heard.beat for heard in self._replicas.values()])

    def scene(self) -> Scene:
        """What a rollout may know of the rest."""
        revisions = [seen.revision for seen in self._ingresses.values()]
        return Scene({state.name: state for state in self.view().variants}, min(revisions, default=-1))

    def load_report(self, variant: str) -> Mapping[str, Any] | None:
        """What the variant's last load said of itself, if a replica has told."""
        return self._reports.get(variant)

    def on_death(self, told: Callable[[str], None]) -> None:
        """From now on `told(variant)` is called for every replica that dies."""
        self._told_of_death.append(told)

    def metrics(self, beat: IngressBeat, *beside: Snapshot) -> str:
        """All that was counted anywhere, with the asking ingress's newest numbers, as Prometheus text."""
        self.ingress(beat)
        return self._ledger.render(self._own_gauges(), *beside)

    def variants(self) -> list[dict[str, Any]]:
        """One JSON-ready mapping per variant: its state, its traffic, how it was loaded and what it takes now."""
        view = self.view()
        serving = view.serving()
        return [
            {
                **asdict(state),
                "weight": self._split.weights.get(state.name, 0.0),
                "serving_weight": serving.weights.get(state.name, 0.0) if serving else 0.0,
                "load_report": self._reports.get(state.name),
                "memory_bytes": self._memory(state.name),
                "energy": self._energy(state),
            }
            for state in view.variants
        ]

    def _state(self, name: str, precision: str) -> VariantState:
        beats = [heard.beat for heard in self._replicas.values() if heard.beat.variant == name]
        ready = [beat for beat in beats if beat.state == "ready"]
        told = (ready or [beat for beat in beats if beat.state == "loading"] or beats)[-1:]
        waiting, is_cold = sum(beat.waiting for beat in ready), self._is_cold(name)
        state = VariantState(name, precision, ready_replicas=len(ready), is_cold=is_cold, waiting=waiting)
        for beat in told:
            state = replace(
                state,
                state=beat.state,
                stage=beat.stage,
                progress=beat.progress,
                reason=beat.reason,
                context_length=beat.context_length,
                fingerprint=beat.fingerprint,
                head=beat.head,
            )
        return state

    def _ready_since(self, beat: ReplicaBeat) -> float:
        before = self._replicas.get(beat.process)
        if before and before.beat.state == "ready":
            return before.ready_since_s
        # One that is ready when a new controller first hears of it may have been so for long.
        return self._clock() if before or not self._is_young else float("-inf")

    def _is_cold(self, name: str) -> bool:
        warm_s = self._clock() - _COLD_S
        ready = [h for h in self._replicas.values() if h.beat.variant == name and h.beat.state == "ready"]
        return any(heard.ready_since_s > warm_s for heard in ready)

    @property
    def _is_young(self) -> bool:
        return self._clock() - self._since_s < _YOUNG_S

    def _memory(self, name: str) -> dict[str, int]:
        total: dict[str, int] = {}
        for heard in self._replicas.values():
            for component, size in heard.beat.memory.items() if heard.beat.variant == name else ():
                total[component] = total.get(component, 0) + size
        return total

    def _energy(self, state: VariantState) -> dict[str, Any]:
        """Since the server's start, over all replicas. Nulls where it is unavailable; `measured` says how, or why not.

        `tokens` are those that were made while it was measured.
        """
        labels = VariantLabels(self._config.model_name, state.name, state.precision)
        joules, tokens = (self._ledger.value(each, labels) for each in (metrics.ENERGY, metrics.ENERGY_TOKENS))
        per_token = joules / tokens if joules is not None and tokens else None
        intensity = self._config.co2_grams_per_kwh
        told = [h.beat.energy for h in self._replicas.values() if h.beat.variant == state.name and h.beat.energy]
        return {
            "measured": "; ".join(dict.fromkeys(told)) or None,
            "joules": joules,
            "tokens": tokens,
            "joules_per_token": per_token,
            "co2_grams_per_kwh": intensity,
            "co2_grams_per_million_tokens": co2_grams_per_million(per_token, intensity),
        }

    def _sweep(self) -> None:
        """Forget the silent, and of a variant with more replicas than it should have those heard longest ago."""
        deadline_s = self._clock() - _SILENT_S
        for process in [name for name, heard in self._replicas.items() if heard.at_s < deadline_s]:
            self._forget(process)
        self._bury()
        for process in [name for name, seen in self._ingresses.items() if seen.at_s < deadline_s]:
            del self._ingresses[process]
            self._ledger.retire(process)
        for variant in self._config.variants:
            heard = [(h.at_s, name) for name, h in self._replicas.items() if h.beat.variant == variant.name]
            for _, process in sorted(heard)[: max(0, len(heard) - variant.resources.replicas)]:
                self._forget(process)
                self._tell_of_death(variant.name)

    def _bury(self) -> None:
        """Those beside us that missed a beat because they are no more."""
        late_s = self._clock() - _LATE_S
        for process, heard in list(self._replicas.items()):
            if heard.at_s < late_s and heard.beat.place and has_died(heard.beat.place):
                self._forget(process)
                self._tell_of_death(heard.beat.variant)

    def _witnessed(self, variant: str) -> None:
        """A request met a dead replica. An only one is forgotten at once, so that nobody is sent to it; if it lives
        after all, its next report brings it back."""
        heard = [name for name, h in self._replicas.items() if h.beat.variant == variant]
        if len(heard) == 1:
            self._forget(heard[0])
        self._tell_of_death(variant)

    def _tell_of_death(self, variant: str) -> None:
        for told in self._told_of_death:
            told(variant)

    def _forget(self, process: str) -> None:
        self._replicas.pop(process, None)
        self._ledger.retire(process)

    def _own_gauges(self) -> Snapshot:
        recorder = Recorder()
        view = self.view()
        serving = view.serving()
        for state in view.variants:
            labels = VariantLabels(self._config.model_name, state.name, state.precision)
            weight = serving.weights.get(state.name, 0.0) if serving else 0.0
            recorder.set(metrics.TRAFFIC_WEIGHT, labels, weight / 100.0)
            if self._config.co2_grams_per_kwh is not None:
                recorder.set(metrics.CO2, labels, self._config.co2_grams_per_kwh)
            if state.name != self._reference:
                recorder.set(metrics.DRIFT_GUARD, labels, kl_guard_nats(state.precision))
            for kind in get_args(State):
                recorder.set(metrics.REPLICAS, labels, self._count(state.name, kind), kind)
        return recorder.snapshot()

    @property
    def _reference(self) -> str:
        return self._config.drift.reference if self._config.drift else self._split.stable

    def _count(self, variant: str, state: str) -> int:
        return sum(h.beat.variant == variant and h.beat.state == state for h in self._replicas.values())

    def _knows(self, split: Split) -> bool:
        return set(split.weights) <= {variant.name for variant in self._config.variants}
