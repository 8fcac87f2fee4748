"""Pruning step by step: a little goes, the original teaches what is left, and then a little more goes.

Taking much at once throws the network off, and a mask chosen on a network that is thrown off is a worse mask. With a
short recovery after each step the next choice is made by weights that work again (Han et al., arXiv 1506.02626; Zhu and
Gupta, arXiv 1710.01878). Each step removes the same share of what is left; zeros stay zeros while the rest recovers.
The longest lesson comes last, and only there the learning rate falls: what stays must learn most.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from serve.compression.artifact import Artifact
from serve.compression.calibration import Calibration
from serve.compression.compress import Progress, silent
from serve.compression.recipe import Recipe
from serve.compression.report import LoadReport
from serve.compression.sizes import between, cut_config, way
from serve.compression.stages import Sparse, Stage
from serve.distillation.held_out import Distance
from serve.distillation.school import School, Text
from serve.distillation.settings import Settings
from serve.distillation.student import make_student, pruning, save_student
from serve.errors import RecipeError
from serve.saving import compress_to

__all__ = ["Gradual", "Step", "compress_gradually", "lessons"]


@dataclass(frozen=True)
class Step:
    """One step: what it removed, counted from the original, and the distance from it before and after recovery."""

    removed: str
    parameters: int
    before: Distance
    after: Distance

    def to_dict(self) -> dict[str, Any]:
        distances = {"before": self.before.to_dict(), "after": self.after.to_dict()}
        return {"removed": self.removed, "parameters": self.parameters, **distances}


@dataclass(frozen=True)
class Gradual:
    """All steps; `result` is the folder `out` measured as it will be served, quantized if the recipe says so."""

    out: str
    recipe: str
    steps: tuple[Step, ...]
    result: Distance
    report: LoadReport | None
    settings: Settings

    def to_dict(self) -> dict[str, Any]:
        return {
            "out": self.out,
            "recipe": self.recipe,
            "steps": [step.to_dict() for step in self.steps],
            "result": self.result.to_dict(),
            "report": self.report.to_dict() if self.report is not None else None,
            "settings": self.settings.to_dict(),
        }


def compress_gradually(
    source: str,
    recipe: Recipe,
    out: Path,
    text: Text,
    *,
    steps: int = 3,
    settings: Settings | None = None,
    calibration: Calibration | None = None,
    device: str = "auto",
    progress: Progress = silent,
) -> Gradual:
    """Prune `source` as `recipe` says in `steps` steps, with distillation after each (`settings.steps` on average, see
    `lessons`), into `out`.

    A pattern (2:4) is no pattern before it is whole, so it is pruned in one step. Quantizers come last. Interrupted,
    the same call goes on from the last checkpoint. Raise a `SetupError` of one line where it cannot be.
    """
    settings = settings or Settings(steps=100)
    _check(recipe)
    decides = {"recipe": recipe.to_dict(), "steps": steps}
    school = School(source, out, text, settings, calibration, device, progress, decides)
    goal = school.source.config
    for stage in recipe.structures:
        goal = cut_config(goal, stage)
    if any(isinstance(stage, Sparse) and stage.pattern for stage in recipe.work):
        steps = 1
    made, folder = [], None
    for number in range(1, steps + 1):
        fraction = number / steps
        pruned = _partly(pruning(recipe), fraction)

        def make(origin: Path | None = folder, fraction: float = fraction, pruned: Recipe | None = pruned) -> Any:
            before = school.origin(origin)
            sizes = way(before.source.config, between(school.source.config, goal, fraction))
            return make_student(before, sizes, pruned=pruned, progress=progress)

        start, before = school.keep(f"pruned-{number}", make)
        share = lessons(settings, number, steps)
        folder, after = school.teach(start, f"recovered-{number}", pruned, share)
        left = int(sum((parameter != 0).sum() for parameter in school.student(folder).model.parameters()))
        made.append(Step(_named(recipe, fraction), left, before, after))
    assert folder is not None
    report = _finish(school, folder, recipe, out)
    result = school.measure(out, _after_cutting(recipe) if report is not None else None)
    if report is not None:
        Artifact.open(out).note_quality(result.noted())
        report = replace(report, quality=result.noted())
    shutil.rmtree(school.folder)
    return Gradual(str(out), recipe.name, tuple(made), result, report, settings)


def lessons(settings: Settings, number: int, steps: int) -> Settings:
    """Half of the lessons of each step but the last are saved for the last, whose model is the one that stays."""
    if number < steps:
        return replace(settings, steps=max(settings.steps // 2, 1), anneal=False)
    return replace(settings, steps=settings.steps + (steps - 1) * (settings.steps - max(settings.steps // 2, 1)))


def _finish(school: School, folder: Path, recipe: Recipe, out: Path) -> LoadReport | None:
    """The recovered student stored as the recipe says; an ordinary checkpoint where it only cuts."""
    rest = _after_cutting(recipe)
    if not rest.work and rest.lm_head == "keep":
        save_student(school.student(folder).model, school.source, out, school.stored_dtype)
        return None
    return compress_to(
        str(folder), rest, out, calibration=school.calibration, device=school.device, progress=school.progress,
        pruned=True,
    )  # fmt: skip


def _check(recipe: Recipe) -> None:
    if not any(stage.kind in ("structure", "prune") for stage in recipe.work):
        raise RecipeError(f"recipe {recipe.name}: --gradual prunes step by step, and there is nothing to prune in it")
    if recipe.overrides:
        raise RecipeError("recipe: overrides cannot be pruned gradually; leave them out")


def _after_cutting(recipe: Recipe) -> Recipe:
    return replace(recipe, stages=tuple(stage for stage in recipe.stages if stage.kind != "structure"))


def _partly(recipe: Recipe | None, fraction: float) -> Recipe | None:
    return recipe and replace(recipe, stages=tuple(_partly_stage(stage, fraction) for stage in recipe.stages))


def _partly_stage(stage: Stage, fraction: float) -> Stage:
    if not isinstance(stage, Sparse) or fraction == 1:
        return stage
    return replace(stage, sparsity=_part(stage.sparsity, fraction))


def _part(share: float, fraction: float) -> float:
    """As a whole percentage, and at least one."""
    return max(round(1 - float((1 - share) ** fraction), 2), 0.01)


def _named(recipe: Recipe, fraction: float) -> str:
    """What a step has removed so far, as a recipe would say it."""
    stages = [stage for stage in recipe.work if stage.kind in ("structure", "prune")]
    shares = [getattr(stage, "sparsity", None) or stage.share for stage in stages]  # type: ignore[attr-defined]
    if fraction == 1:
        return "+".join(stage.name for stage in stages)
    parts = zip(stages, shares, strict=True)
    return "+".join(f"{stage.method}{round(100 * _part(share, fraction))}" for stage, share in parts)
