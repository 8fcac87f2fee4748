"""A variant: one model at one precision, with all that one deployment of it needs. Pure data, no torch and no Ray."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TypeVar

from serve.compression.calibration import Calibration
from serve.compression.recipe import Recipe
from serve.engine.settings import EngineSettings

__all__ = ["Resources", "Variant"]

_INGRESS_CPUS = 0.1
_Number = TypeVar("_Number", int, float)


@dataclass(frozen=True)
class Resources:
    """What one replica takes of its machine. None means "auto": `Variant.resolved` returns a copy that has every value.

    num_cpus and num_gpus are reservations in Ray's books and may be fractions; what torch really uses is
    `EngineSettings.threads`.
    """

    replicas: int = 1
    num_cpus: float | None = None
    num_gpus: float | None = None


@dataclass(frozen=True)
class Variant:
    """`NAME@name`. Knows nothing of traffic: weights belong to the split, which changes while variants stand."""

    name: str
    source: str
    recipe: Recipe
    device: str = "auto"
    engine: EngineSettings = field(default_factory=EngineSettings)
    resources: Resources = field(default_factory=Resources)
    calibration: Calibration | None = None

    @property
    def precision(self) -> str:
        return self.recipe.precision

    def resolved(self, *, cpus: float, gpus: float, replicas: int, ingresses: int = 1) -> Variant:
        """This variant with its share of a machine that `replicas` replicas of all variants divide.

        CPUs are reserved in equal parts beside the ingresses, so that the last variant still schedules. Threads are
        divided too: two variants at work with two threads each on two busy cores made 130 tokens/s each, with one
        thread 530, because threads that meet at every layer's end wait for whichever of them is not running.
        """
        wants_gpu = self.device != "cpu" and gpus > 0
        share = replace(
            self.resources,
            num_cpus=_or(
                self.resources.num_cpus, _hundredths(min(1.0, max(0.0, cpus - ingresses * _INGRESS_CPUS) / replicas))
            ),
            num_gpus=_or(self.resources.num_gpus, _hundredths(min(1.0, gpus / replicas)) if wants_gpu else 0.0),
        )
        device = ("cuda" if share.num_gpus else "cpu") if self.device == "auto" else self.device
        engine = replace(self.engine, threads=_or(self.engine.threads, max(1, int(cpus / replicas))))
        return replace(self, device=device, engine=engine, resources=share)


def _or(value: _Number | None, default: _Number) -> _Number:
    return default if value is None else value


def _hundredths(share: float) -> float:
    """Rounded down, so that all shares together never exceed the whole."""
    return int(share * 100) / 100
