"""The one place that knows every process: it holds the split, merges what the others report and answers with the view.

Nothing waits for it. If it is gone, ingresses go on with the last split and replicas go on serving; a new one learns
the states from the next reports and the split from the ingresses. It knows neither models nor HTTP, and its clock is
given to it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from serve import metrics
from serve.config import Config
from serve.errors import ConfigError
from serve.heartbeat import IngressBeat, ReplicaBeat, VariantState, View
from serve.metrics import Ledger, Recorder, Snapshot, VariantLabels
from serve.rollout import Split, kl_guard_nats

__all__ = ["Controller"]

_SILENT_S = 15.0
"""A process that has said nothing for so long is taken for dead."""


@dataclass(frozen=True)
class _Heard:
    """The last word of a replica and when it came."""

    beat: ReplicaBeat
    at_s: float


class Controller:
    """Merges reports, deals traffic. Every method is short and synchronous: one event loop, no locks."""

    def __init__(self, config: Config, clock: Callable[[], float] = time.monotonic) -> None:
        self._config = config
        self._clock = clock
        self._split = config.split
        self._replicas: dict[str, _Heard] = {}
        self._ingresses: dict[str, float] = {}
        self._reports: dict[str, Mapping[str, Any]] = {}
        self._ledger = Ledger()

    def replica(self, beat: ReplicaBeat) -> bool:
        """Take a replica's report; True asks it to send its load report again."""
        self._ledger.update(beat.process, beat.snapshot)
        if beat.report is not None:
            self._reports[beat.variant] = beat.report
        if beat.leaving:
            self._forget(beat.process)
            return False
        self._replicas[beat.process] = _Heard(beat, self._clock())
        self._sweep()
        return beat.state == "ready" and beat.variant not in self._reports

    def ingress(self, beat: IngressBeat) -> View:
        """Take an ingress's report and answer with the view. A newer split than ours is one that we have forgotten."""
        self._ingresses[beat.process] = self._clock()
        self._ledger.update(beat.process, beat.snapshot)
        if beat.split and beat.split.revision > self._split.revision and self._knows(beat.split):
            self._split = beat.split
        return self.view()

    def view(self) -> View:
        self._sweep()
        return View(self._split, tuple(self._state(v.name, v.precision) for v in self._config.variants))

    def set_traffic(self, weights: Mapping[str, float]) -> View:
        """Deal traffic anew: one revision more, and nothing restarts. Raises ConfigError by the key's path."""
        names = [variant.name for variant in self._config.variants]
        for name in weights:
            if name not in names:
                raise ConfigError(f"traffic.weights.{name}", f"unknown variant; allowed: {', '.join(names)}")
        self._split = self._split.moved(weights)
        return self.view()

    def metrics(self, beat: IngressBeat) -> str:
        """All that was counted anywhere, with the asking ingress's newest numbers, as Prometheus text."""
        self.ingress(beat)
        return self._ledger.render(self._own_gauges())

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
            }
            for state in view.variants
        ]

    def _state(self, name: str, precision: str) -> VariantState:
        beats = [heard.beat for heard in self._replicas.values() if heard.beat.variant == name]
        ready = [beat for beat in beats if beat.state == "ready"]
        told = (ready or [beat for beat in beats if beat.state == "loading"] or beats)[-1:]
        state = VariantState(name, precision, ready_replicas=len(ready))
        for beat in told:
            state = replace(
                state,
                state=beat.state,
                stage=beat.stage,
                progress=beat.progress,
                reason=beat.reason,
                context_length=beat.context_length,
                fingerprint=beat.fingerprint,
            )
        return state

    def _memory(self, name: str) -> dict[str, int]:
        total: dict[str, int] = {}
        for heard in self._replicas.values():
            for component, size in heard.beat.memory.items() if heard.beat.variant == name else ():
                total[component] = total.get(component, 0) + size
        return total

    def _sweep(self) -> None:
        """Forget the silent, and of a variant with more replicas than it should have those heard longest ago."""
        deadline_s = self._clock() - _SILENT_S
        for process in [name for name, heard in self._replicas.items() if heard.at_s < deadline_s]:
            self._forget(process)
        for process in [name for name, at_s in self._ingresses.items() if at_s < deadline_s]:
            del self._ingresses[process]
            self._ledger.retire(process)
        for variant in self._config.variants:
            heard = [(h.at_s, name) for name, h in self._replicas.items() if h.beat.variant == variant.name]
            for _, process in sorted(heard)[: max(0, len(heard) - variant.resources.replicas)]:
                self._forget(process)

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
            if state.name != self._split.stable:
                recorder.set(metrics.DRIFT_GUARD, labels, kl_guard_nats(state.precision))
            for kind in ("loading", "ready", "failed"):
                recorder.set(metrics.REPLICAS, labels, self._count(state.name, kind), kind)
        return recorder.snapshot()

    def _count(self, variant: str, state: str) -> int:
        return sum(h.beat.variant == variant and h.beat.state == state for h in self._replicas.values())

    def _knows(self, split: Split) -> bool:
        return set(split.weights) <= {variant.name for variant in self._config.variants}
