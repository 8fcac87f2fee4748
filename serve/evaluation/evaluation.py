"""Runs an evaluation row by row, and keeps what is measured so far: whoever interrupts it still has that."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from serve import fresh_process
from serve.bench import Bench, BenchSettings, run_bench
from serve.compression.recipe import Recipe
from serve.errors import SetupError
from serve.evaluation.result import Quality, Reference, Row
from serve.evaluation.setup import Setup
from serve.fresh_process import Progress

__all__ = ["Evaluation", "Step"]

Step = Callable[[str], AbstractContextManager[Progress]]
"""Opens a named step and gives its progress."""


@dataclass
class Evaluation:
    """`run` fills `reference`, then a row per recipe, then their speeds; `failed` says which recipes could not be
    measured and why. Recipes are independent: one that fails does not stop the others.
    """

    setup: Setup
    recipes: Sequence[Recipe]
    bench: BenchSettings | None = field(default_factory=BenchSettings)
    reference: Reference | None = None
    rows: list[Row] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)

    def run(self, step: Step) -> None:
        """Measure everything. Raise a `SetupError` where the reference itself cannot be measured."""
        with tempfile.TemporaryDirectory(prefix="halftone-evaluate-") as folder:
            with step(f"{self.setup.reference.name} (reference)") as progress:
                self.reference = _record(progress, self.setup, Path(folder))
            for recipe in self.recipes:
                with self._noting(recipe, step, "") as progress:
                    self.rows.append(Row(_score(progress, self.setup, recipe, self.reference), self.reference))
        if self.bench is not None and self.rows:
            self._time(self.bench, step)

    def _time(self, settings: BenchSettings, step: Step) -> None:
        reference, source = self.setup.reference, self.setup.reference_source or self.setup.source
        with step(f"{reference.name} (reference) speed") as progress:
            yardstick = self._bench(reference, source, settings, progress)
        for recipe in self.recipes:
            row = next((index for index, row in enumerate(self.rows) if row.recipe == recipe.name), None)
            if row is not None:
                with self._noting(recipe, step, " speed") as progress:
                    same = (recipe, self.setup.source) == (reference, source)
                    found = yardstick if same else self._bench(recipe, self.setup.source, settings, progress)
                    self.rows[row] = replace(self.rows[row], bench=found, reference_bench=yardstick)

    def _bench(self, recipe: Recipe, source: str, settings: BenchSettings, progress: Progress) -> Bench:
        setup = self.setup
        return run_bench(
            source, recipe, settings, progress,
            device=setup.device, calibration=setup.calibration, fresh=setup.fresh,
        )  # fmt: skip

    @contextmanager
    def _noting(self, recipe: Recipe, step: Step, purpose: str) -> Iterator[Progress]:
        """A step whose failure is noted, and only that recipe's."""
        try:
            with step(f"{recipe.name}{purpose}") as progress:
                yield progress
        except SetupError as error:
            self.failed[f"{recipe.name}{purpose}"] = error.message

    def to_dict(self) -> dict[str, Any]:
        """The JSON shape: stable, see `--help`."""
        details = self.reference.to_dict() if self.reference is not None else None
        return {
            "reference": self.setup.reference.name,
            "rows": [row.to_dict() for row in self.rows],
            "reference_details": details,
            "failed": self.failed,
        }


# Torch is loaded in the child only.


def _record(progress: Progress, setup: Setup, folder: Path) -> Reference:
    return fresh_process.run(progress, record_reference, setup, folder)


def _score(progress: Progress, setup: Setup, recipe: Recipe, reference: Reference) -> Quality:
    return fresh_process.run(progress, score, setup, recipe, reference)


def record_reference(progress: Progress, setup: Setup, folder: Path) -> Reference:
    from serve.evaluation import scoring

    return scoring.record_reference(progress, setup, folder)


def score(progress: Progress, setup: Setup, recipe: Recipe, reference: Reference) -> Quality:
    from serve.evaluation import scoring

    return scoring.score(progress, setup, recipe, reference)
