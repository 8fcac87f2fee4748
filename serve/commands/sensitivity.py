"""`halftone sensitivity`: which layers, or projections, a recipe hurts most."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

import typer

from serve.commands import options

if TYPE_CHECKING:
    from rich.table import Table

    from serve.compression.effects import Effect

__all__ = ["sensitivity"]


def sensitivity(
    source: options.Source,
    recipe: Annotated[
        str, typer.Option(help="What is done to one part at a time, as gptq4-g64 or wanda50.")
    ] = "gptq3-g64",
    by: Annotated[Literal["layer", "projection"], typer.Option(help="What a part is.")] = "projection",
    calibration: options.CalibrationFile = None,
    num_samples: options.NumSamples = 32,
    sample_tokens: options.SampleTokens = None,
    calibration_seed: options.CalibrationSeed = None,
    device: options.Device = "auto",
    as_json: options.AsJson = False,
) -> None:
    """Compress one part at a time, all else in float32, and measure KL(dense || changed) on the calibration text.

    `mixed` recipes choose by such measurements; with `skip` and `overrides` a recipe can be chosen by hand.

    JSON: {"source", "recipe", "by", "rows": [{"name", "kl_divergence", "weights"}]}, in the model's
    order.
    """
    from serve.commands.terminal import Steps, print_json, standard_error, standard_output
    from serve.compression.recipe import Recipe
    from serve.loading import measure_sensitivity

    parsed = Recipe.parse(recipe)
    samples = options.calibration(calibration, num_samples, sample_tokens, calibration_seed)
    with Steps(1, standard_error())(parsed.name) as progress:
        rows = measure_sensitivity(source, parsed, by, device=device, calibration=samples, progress=progress)
    if as_json:
        print_json({"source": source, "recipe": parsed.name, "by": by, "rows": [row.to_dict() for row in rows]})
    else:
        standard_output().print(_table(rows))


def _table(rows: list[Effect]) -> Table:
    from rich.table import Table

    table = Table("part, most sensitive first", box=None, header_style="bold", pad_edge=False)
    for title in ("KL mean", "weights"):
        table.add_column(title, justify="right")
    for row in sorted(rows, key=lambda row: -row.kl_divergence):
        table.add_row(row.name, f"{row.kl_divergence:.5f}", f"{row.weights:,}")
    return table
