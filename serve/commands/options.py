"""Options that several commands have, spelled once."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from serve.compression.calibration import Calibration
    from serve.compression.recipe import Recipe

__all__ = [
    "AsJson",
    "CalibrationFile",
    "CalibrationSeed",
    "Device",
    "Fresh",
    "NumSamples",
    "Recipes",
    "SampleTokens",
    "Source",
    "Threads",
    "calibration",
    "recipes",
]

Source = Annotated[str, typer.Argument(help="The model: a folder, a Hub id or builtin:storyteller.")]
Recipes = Annotated[
    list[str], typer.Option("--recipe", help="What to do to the weights, as gptq4-g64 or wanda50+int8 (repeatable).")
]
CalibrationFile = Annotated[
    Path | None,
    typer.Option(
        "--calibration",
        help="Text, JSONL or Parquet to calibrate on, or hub:OWNER/NAME[:FILE]. Default: the bundled stories.",
    ),
]
NumSamples = Annotated[int, typer.Option(min=1, help="Records of the calibration text to take.")]
SampleTokens = Annotated[
    int | None, typer.Option(min=1, help="Cut each record at so many tokens. Default: the model's context.")
]
CalibrationSeed = Annotated[
    int | None, typer.Option(help="Draw the records by this seed. Default: take the first ones.")
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
Threads = Annotated[int | None, typer.Option(min=1, help="Torch threads. Default: torch's own choice.")]
Fresh = Annotated[bool, typer.Option("--fresh", help="Compress anew, leaving the artifact store alone.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON alone on standard output.")]


def recipes(names: list[str]) -> list[Recipe]:
    """Parse all before anything is measured; two spellings of one recipe count once."""
    from serve.compression.recipe import Recipe

    return list({recipe.name: recipe for recipe in map(Recipe.parse, names)}.values())


def calibration(
    file: Path | None, num_samples: int, max_tokens: int | None = None, seed: int | None = None
) -> Calibration | None:
    """None leaves the choice to the loader."""
    from serve.compression.calibration import Calibration, bundled

    chosen = Calibration(file or bundled().file, num_samples, max_tokens, seed)
    return None if chosen == bundled() else chosen
