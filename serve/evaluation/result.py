"""The rows of an evaluation, as plain data, and the one number that sums a row up.

    efficiency = accuracy / size x speed

with all three relative to the reference: next-token accuracy kept, bytes of the model, decode tokens per second of one
sequence. The reference has 1; above it, what was saved is worth more than what was lost.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from serve.bench import Bench

__all__ = ["Quality", "Reference", "Row", "plain"]

Place = tuple[int, int, int]
_SPREAD = ("max", "p99_9", "p99", "p95", "p90", "median", "p10", "p5", "p1", "p0_1", "min")


@dataclass(frozen=True)
class Reference:
    """The reference's logits on every record, in `file`, and what it is by itself.

    `places` maps token ids to (offset in bytes, rows, vocabulary). `noise_floor` is the reference against itself
    computed in another floating type (`dtype`): a difference no larger than that is arithmetic, not compression. None
    where its weights cannot be recast, because they are quantized.
    """

    recipe: str
    records: tuple[tuple[int, ...], ...]
    file: Path
    places: Mapping[tuple[int, ...], Place]
    total_bytes: int
    perplexity: Mapping[str, Any]
    accuracy: float
    noise_floor: Mapping[str, Any] | None

    @property
    def tokens(self) -> int:
        """Scored tokens: all but the first of each record."""
        return sum(len(ids) - 1 for ids in self.records)

    def to_dict(self) -> dict[str, Any]:
        return {
            "recipe": self.recipe,
            "records": len(self.records),
            "tokens": self.tokens,
            "bytes": self.total_bytes,
            "perplexity": dict(self.perplexity),
            "accuracy": self.accuracy,
            "noise_floor": dict(self.noise_floor) if self.noise_floor is not None else None,
        }


@dataclass(frozen=True)
class Quality:
    """One recipe scored: `divergence` is `serve.quality.Divergence` as plain data, `report` the load report."""

    recipe: str
    divergence: Mapping[str, Any]
    report: Mapping[str, Any]

    def noted(self, reference: str) -> dict[str, Any]:
        """What the manifest of these weights says of them: how far they are from the recipe `reference`."""
        found = self.divergence
        return {
            "reference": reference,
            "tokens": found["tokens"],
            "kl_divergence": found["kl_divergence"]["mean"],
            "top1_agreement": found["top1_agreement"],
            "perplexity_ratio": found["perplexity_ratio"],
            "accuracy": found["accuracy"]["variant"],
            "flips": found["accuracy"]["flips"],
        }


@dataclass(frozen=True)
class Row:
    """A recipe's quality, and its speed once that is measured. Ratios are to the reference."""

    quality: Quality
    reference: Reference
    bench: Bench | None = None
    reference_bench: Bench | None = None

    @property
    def recipe(self) -> str:
        return self.quality.recipe

    @property
    def bytes(self) -> int:
        return int(self.quality.report["total_bytes"])

    @property
    def compression_ratio(self) -> float:
        """How many times smaller than the reference."""
        return self.reference.total_bytes / self.bytes

    @property
    def kl_divergence(self) -> float:
        return float(self.quality.divergence["kl_divergence"]["mean"])

    @property
    def accuracy_kept_ratio(self) -> float:
        return float(self.quality.divergence["accuracy"]["kept_ratio"])

    @property
    def tokens_per_s(self) -> float | None:
        """Decoding, at the smallest batch size measured."""
        return _decode(self.bench)

    @property
    def speedup(self) -> float | None:
        """Decoding against the reference."""
        ours, theirs = _decode(self.bench), _decode(self.reference_bench)
        return ours / theirs if ours is not None and theirs else None

    @property
    def efficiency(self) -> float | None:
        """Accuracy / size x speed; None while the speed is not known."""
        return None if self.speedup is None else self.accuracy_kept_ratio * self.compression_ratio * self.speedup

    def to_dict(self) -> dict[str, Any]:
        divergence, report = self.quality.divergence, self.quality.report
        return {
            "recipe": self.recipe,
            "bits_per_weight": report["bits_per_weight"],
            "bytes": self.bytes,
            "compression_ratio": self.compression_ratio,
            "perplexity": divergence["perplexity_variant"]["value"],
            "perplexity_ratio": divergence["perplexity_ratio"],
            "kl_divergence": _distribution(divergence["kl_divergence"], divergence["kl_divergence_interval"]),
            "top1_agreement": divergence["top1_agreement"],
            "accuracy": divergence["accuracy"]["variant"],
            "flips": divergence["accuracy"]["flips"],
            "load_s": report["load_s"],
            "peak_load_bytes": report["peak_load_bytes"],
            "speed": self._speed(),
            "efficiency": self.efficiency,
            "details": self._details(),
        }

    def _speed(self) -> list[dict[str, Any]]:
        return [
            {"phase": speed.phase, "batch_size": speed.batch_size, "tokens_per_s": speed.tokens_per_s}
            for speed in (self.bench.speed if self.bench else ())
        ]

    def _details(self) -> dict[str, Any]:
        """All else that is known: the rest of the divergence, the load report and the bench."""
        divergence = dict(self.quality.divergence)
        divergence["delta_p"] = _distribution(divergence["delta_p"])
        return {
            "divergence": {key: value for key, value in divergence.items() if not key.startswith("kl_divergence")},
            "load": dict(self.quality.report),
            "bench": self.bench.to_dict() if self.bench else None,
        }


def plain(data: Any) -> Any:
    """For JSON, which knows neither NaN nor infinity: they become null."""
    if isinstance(data, Mapping):
        return {key: plain(value) for key, value in data.items()}
    if isinstance(data, (list, tuple)):
        return [plain(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data


def _decode(bench: Bench | None) -> float | None:
    if bench is None:
        return None
    return bench.tokens_per_s("decode", min(s.batch_size for s in bench.speed if s.phase == "decode"))


def _distribution(percentiles: Mapping[str, float], interval: tuple[float, float] | None = None) -> dict[str, Any]:
    """`mean`, its uncertainty, then every percentile from the top; the median is `p50`, as everywhere else."""
    spread = {("p50" if name == "median" else name): percentiles[name] for name in _SPREAD}
    bounds = {"interval": list(interval)} if interval is not None else {}
    return {"mean": percentiles["mean"], "standard_error": percentiles["standard_error"], **bounds, **spread}
