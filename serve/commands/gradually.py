"""`halftone compress --gradual`: pruning in steps, with lessons from the original between them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from serve.commands.learning import distances, lessons

if TYPE_CHECKING:
    from serve.compression.calibration import Calibration
    from serve.compression.recipe import Recipe
    from serve.distillation import gradual
    from serve.distillation.school import Text
    from serve.distillation.settings import Settings

__all__ = ["Gradual", "GradualSteps", "RecoverySteps", "run"]

Gradual = Annotated[
    bool, typer.Option("--gradual", help="Prune in steps, and distil from the original after each. Needs --out.")
]
GradualSteps = Annotated[int, typer.Option(min=1, help="With --gradual: how many steps.")]
RecoverySteps = Annotated[
    int,
    typer.Option(
        min=1, help="With --gradual: batches to learn from after a step, on average; the last step has the most."
    ),
]


def run(
    source: str,
    recipe: Recipe,
    out: Path,
    text: Text,
    steps: int,
    settings: Settings,
    calibration: Calibration | None,
    device: str,
    *,
    as_json: bool,
) -> None:
    """Compress, and print the quality after each step."""
    from serve.commands.terminal import print_json
    from serve.distillation.gradual import compress_gradually
    from serve.evaluation.result import plain

    with lessons(f"{recipe.name} gradually") as progress:
        found = compress_gradually(
            source, recipe, out, text, steps=steps, settings=settings, calibration=calibration, device=device,
            progress=progress,
        )  # fmt: skip
    if as_json:
        print_json(plain(found.to_dict()))
    else:
        _show(found)


def _show(found: gradual.Gradual) -> None:
    from serve.commands.terminal import standard_output

    console, rows = standard_output(), []
    for step in found.steps:
        rows += [(step.removed, step.before), (f"{step.removed}, recovered", step.after)]
    console.print(distances([*rows, (f"{found.recipe}, as stored", found.result)]))
    left = found.steps[-1].parameters
    console.print(f"{left:,} parameters that are not zero, in {found.out}", markup=False)
