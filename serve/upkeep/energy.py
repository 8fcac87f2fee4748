"""The energy of one variant's answers, and how much of a shared counter is its own.

A processor's counter counts the whole package: every variant on it, and whatever else runs. A process is given the part
that its processor time is of all processor time that was used on the machine meanwhile. So the parts of all processes
add up to the counter, and the idle power of a busy second is carried by those who were busy in it. Seconds in which the
engine made no step are left out: what an idle machine takes belongs to nobody's answers. A GPU's counter is divided by
the driver's utilization samples (`gpu`).

Where a counter is missing nothing is estimated: the reason is told in its place.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import psutil

from serve.errors import Unmeasurable
from serve.upkeep.gpu import Gpu
from serve.upkeep.rapl import POWERCAP, Rapl

__all__ = ["Energy", "EnergyMeter", "Processor"]


class Source(Protocol):
    """One counter and this process's part of it. Raises Unmeasurable once it cannot be told any more."""

    name: str

    def take_joules(self) -> float:
        """Of this process, since it was last asked."""


@dataclass(frozen=True)
class Energy:
    """Since the start. `tokens` were generated meanwhile, for clients and mirrors. joules: None is unavailable, and
    `told` says why; otherwise it says what was measured and how it was divided."""

    joules: float | None
    tokens: int
    told: str


class Processor:
    """The machine's RAPL counters, divided by processor time."""

    def __init__(self, rapl: Rapl, clock: Callable[[], tuple[float, float]] | None = None) -> None:
        self._rapl = rapl
        self._clock = clock or _processor_times
        self._last = self._clock()
        self.name = f"{rapl.name} (this process's part by processor time)"

    def take_joules(self) -> float:
        taken, (mine, all_of_it) = self._rapl.take_joules(), self._clock()
        mine_s, all_s = mine - self._last[0], all_of_it - self._last[1]
        self._last = mine, all_of_it
        return taken * min(1.0, max(0.0, mine_s / all_s)) if all_s > 0 else 0.0


class EnergyMeter:
    """Adds up while the engine works. Its methods read files or ask a driver: not for an event loop."""

    def __init__(self, sources: list[Source], missing: str = "") -> None:
        self._sources = sources
        self._missing = missing
        self._joules = 0.0
        self._tokens = 0
        self._last_steps: int | None = None
        self._last_tokens = 0

    @classmethod
    def of(cls, device: str, powercap: Path = POWERCAP) -> EnergyMeter:
        """What there is to read for a variant on `device`. On a GPU the processor's part is added where it can be
        read; without the GPU's own the processor's would mislead, and nothing is measured."""
        try:
            if not device.startswith("cuda"):
                return cls([Processor(Rapl(powercap))])
            gpu = Gpu.of(device)
        except Unmeasurable as error:
            return cls([], error.message)
        try:
            return cls([gpu, Processor(Rapl(powercap))])
        except Unmeasurable as error:
            return cls([gpu], f"without the processor: {error.message}")

    def take(self, *, steps: int, tokens: int) -> None:
        """Look at the counters; `steps` and `tokens` are the engine's totals."""
        worked = self._last_steps is not None and steps > self._last_steps
        made, self._last_steps, self._last_tokens = tokens - self._last_tokens, steps, tokens
        try:
            taken = sum(source.take_joules() for source in self._sources)
        except Unmeasurable as error:
            self._sources, self._missing = [], error.message
            return
        if worked and self._sources:
            self._joules += taken
            self._tokens += made

    @property
    def energy(self) -> Energy:
        if not self._sources:
            return Energy(None, 0, f"unavailable: {self._missing}")
        names = " and ".join(source.name for source in self._sources)
        return Energy(self._joules, self._tokens, f"{names}; {self._missing}" if self._missing else names)


def _processor_times() -> tuple[float, float]:
    """Seconds that this process, and that the whole machine, has computed."""
    mine, everybody = psutil.Process().cpu_times(), psutil.cpu_times()
    kinds = ("user", "nice", "system", "irq", "softirq")
    return mine.user + mine.system, sum(getattr(everybody, kind, 0.0) for kind in kinds)
