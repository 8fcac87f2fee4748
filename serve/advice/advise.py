"""Measures what could be, rules out what cannot, and recommends: see `judge` for the rules."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import psutil

from serve.advice.footprint import Footprint, footprints
from serve.advice.judge import Candidate, Verdict, judge
from serve.advice.target import Target
from serve.bench import BenchSettings
from serve.compression.recipe import Recipe
from serve.evaluation import Evaluation, Row, Setup
from serve.evaluation.evaluation import Step

__all__ = ["Advice", "advise"]

_SERVER_BATCH = 8


@dataclass
class Advice:
    """`verdicts` has one for every candidate, best first. `remarks` say what the numbers do not cover."""

    target: Target
    source: str
    reference: str
    verdicts: list[Verdict] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)

    @property
    def recommended(self) -> Verdict | None:
        return next((verdict for verdict in self.verdicts if verdict.verdict == "recommended"), None)

    @property
    def follows_rule(self) -> bool | None:
        """Whether the recommendation is what the rule of thumb says for such a device; a student agrees on edge."""
        best, traits = self.recommended, self.target.traits
        if best is None:
            return None
        last = best.recipe.rpartition("+")[2]
        return last.startswith(traits.rule) or (not traits.server and best.source != self.source)

    def to_dict(self) -> dict[str, Any]:
        best = self.recommended
        return {
            "source": self.source,
            "device": self.target.device,
            "memory_bytes": self.target.memory_bytes,
            "floor_ratio": self.target.floor_ratio,
            "max_kl": self.target.max_kl,
            "sequences": self.target.sequences,
            "reference": self.reference,
            "recommended": best.to_dict() if best is not None else None,
            "candidates": [verdict.to_dict() for verdict in self.verdicts],
            "rule_of_thumb": list(self.target.traits.rule),
            "follows_rule": self.follows_rule,
            "remarks": self.remarks,
        }


def advise(
    setup: Setup,
    target: Target,
    step: Step,
    *,
    recipes: Sequence[Recipe] = (),
    students: Sequence[str] = (),
    bench: BenchSettings | None = None,
    has_gpu: bool = False,
) -> Advice:
    """Measure `recipes` (None: those usual for the device) on the setup's source, and on `students` distilled from it.

    Without a GPU of its own a GPU's candidates are measured here for quality alone. Raise a `SetupError` where the
    reference itself cannot be measured.
    """
    chosen = list(recipes or map(Recipe.parse, target.traits.recipes))
    here = "cuda" if target.device == "cuda" and has_gpu else "cpu"
    setup = replace(setup, device=here)
    timed = bench if target.traits.server and (target.device != "cuda" or has_gpu) else None
    advice = Advice(target, setup.source, setup.reference.name)
    measured: list[Candidate] = []
    for source in (setup.source, *students):
        with step(f"sizes of {source}") as progress:
            sizes = footprints(progress, source, chosen, here)
        setup = _with_reference(setup, sizes, advice)
        possible = _possible(chosen, source, sizes, target, advice)
        if possible:
            measured += _measure(setup, source, possible, sizes, target, timed, step, advice)
    advice.verdicts = [*judge(measured, target), *advice.verdicts]
    _remark(advice, timed)
    return advice


def _with_reference(setup: Setup, sizes: Footprint, advice: Advice) -> Setup:
    """The full 32 bits where this machine has the memory for them."""
    if setup.reference.name == "fp32" and 1.5 * sizes.dense_bytes > psutil.virtual_memory().available:
        setup = replace(setup, reference=Recipe.parse("bf16"))
        advice.reference = "bf16"
        advice.remarks.append("compared with bf16, for this machine lacks the memory for fp32")
    return setup


def _possible(recipes: Sequence[Recipe], source: str, sizes: Footprint, target: Target, advice: Advice) -> list[Recipe]:
    """Those worth measuring; what is too large, or refused, gets its verdict now."""
    left = []
    for recipe in recipes:
        needed = sizes.model_bytes.get(recipe.name, 0) + target.sequences * sizes.kv_bytes.get(recipe.name, 0)
        if recipe.name in sizes.refused:
            advice.verdicts.append(Verdict(recipe.name, source, "ruled out", sizes.refused[recipe.name], None))
        elif needed > target.memory_bytes:
            reason = f"needs at least {needed:,} bytes of memory, and there are {target.memory_bytes:,}; not measured"
            advice.verdicts.append(Verdict(recipe.name, source, "ruled out", reason, None))
        else:
            left.append(recipe)
    return left


def _measure(
    setup: Setup,
    source: str,
    recipes: Sequence[Recipe],
    sizes: Footprint,
    target: Target,
    timed: BenchSettings | None,
    step: Step,
    advice: Advice,
) -> list[Candidate]:
    setup = replace(setup, source=source, reference_source=None if source == setup.source else setup.source)
    evaluation = Evaluation(setup, recipes, timed)
    evaluation.run(step)
    for name, reason in evaluation.failed.items():
        advice.verdicts.append(Verdict(name, source, "ruled out", reason, None))
    return [_candidate(row, source, sizes, target) for row in evaluation.rows]


def _candidate(row: Row, source: str, sizes: Footprint, target: Target) -> Candidate:
    bench, kv = row.bench, target.sequences * sizes.kv_bytes[row.recipe]
    needed, batch = row.bytes + kv, _SERVER_BATCH if target.traits.server else 1
    if bench is not None and target.device == "cuda":
        needed = max(needed, bench.device_peak_bytes - bench.kv_cache_bytes + kv)
    elif bench is not None:
        needed += max(0, bench.resident_bytes - bench.kv_cache_bytes - row.bytes)
    return Candidate(
        recipe=row.recipe,
        source=source,
        bytes=row.bytes,
        needed_bytes=needed,
        kl_divergence=row.kl_divergence,
        accuracy_kept_ratio=row.accuracy_kept_ratio,
        flips=float(row.quality.divergence["accuracy"]["flips"]),
        tokens_per_s=bench.tokens_per_s("decode", batch) if bench is not None else None,
        efficiency=row.efficiency,
    )


def _remark(advice: Advice, timed: BenchSettings | None) -> None:
    traits = advice.target.traits
    if traits.server and timed is None:
        advice.remarks.append(
            "speed was not measured; the smallest model stands for the fastest, since decoding reads all of it"
        )
    if not traits.server:
        advice.remarks.append(
            "memory is the model's and its keys and values; what the program on the device takes comes on top"
        )
    if advice.recommended is None:
        advice.remarks.append(
            "nothing fits and keeps the floor: lower the floor, or distil a student (`halftone distill`) and name it "
            "with --student"
        )
