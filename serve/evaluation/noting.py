"""What compressing a model cost in quality, measured as soon as it is done and written into the manifest."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from serve.compression.artifact import Artifact
from serve.compression.recipe import Recipe
from serve.errors import SetupError
from serve.evaluation.evaluation import Evaluation, Step
from serve.evaluation.setup import Setup

__all__ = ["note_quality"]


def note_quality(setup: Setup, recipe: Recipe, out: Path | None, step: Step) -> dict[str, Any]:
    """Score what `recipe` made of `setup.source`, in folder `out` or (None) in the artifact store, and note it there.

    Raise a `SetupError` where it cannot be scored. The store's own keeps what a longer text said before.
    """
    if out is not None:
        setup = replace(setup, source=str(out), reference_source=setup.source)
    evaluation = Evaluation(setup, [recipe], bench=None)
    evaluation.run(step)
    if evaluation.failed:
        raise SetupError("; ".join(evaluation.failed.values()))
    noted = evaluation.rows[0].quality.noted(setup.reference.name)
    if out is not None:
        Artifact.open(out).note_quality(noted)
    return noted
