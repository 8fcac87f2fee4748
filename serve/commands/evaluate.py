"""`halftone evaluate`: what each recipe costs in quality and saves in bytes and time."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from serve.commands import options

if TYPE_CHECKING:
    from serve.evaluation import Evaluation

__all__ = ["evaluate"]


def evaluate(
    source: options.Source,
    recipe: options.Recipes,
    reference: Annotated[str, typer.Option(help="The recipe that all are compared with.")] = "fp32",
    reference_source: Annotated[
        str | None, typer.Option(help="Another model as reference, with the same tokenizer: a distilled one's teacher.")
    ] = None,
    text: Annotated[
        Path | None,
        typer.Option(help="JSONL ({'text': ...}) or plain text to score. Default: 48 bundled children's stories."),
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Score the first records of the text only.")] = None,
    calibration: options.CalibrationFile = None,
    num_samples: options.NumSamples = 128,
    sample_tokens: options.SampleTokens = None,
    calibration_seed: options.CalibrationSeed = None,
    plot: Annotated[
        Path | None, typer.Option(help="Draw quality against bytes and speed (.png, .svg, .pdf). Needs matplotlib.")
    ] = None,
    speed: Annotated[bool, typer.Option(help="Also time the engine, as `halftone bench` does.")] = True,
    details: Annotated[bool, typer.Option("--details", help="Print all of each recipe's statistics.")] = False,
    as_markdown: Annotated[bool, typer.Option("--markdown", help="Print tables for a document instead.")] = False,
    device: options.Device = "auto",
    threads: options.Threads = None,
    fresh: options.Fresh = False,
    as_json: options.AsJson = False,
) -> None:
    """Compare recipes with a reference on a text: divergence, accuracy, bytes, load, speed and efficiency.

    Each model is loaded in a process of its own, so that peaks are its own; the reference's logits are computed once.
    Records are scored one by one, each cut at the model's context; errors are paired, token by token.

    efficiency = accuracy / size x speed, each relative to the reference (which has 1): next-token accuracy kept,
    bytes of the model, and decode tokens per second of one sequence.

    Ctrl-C prints what was measured so far.

    JSON: {"reference", "rows": [{"recipe", "bits_per_weight", "bytes", "compression_ratio" (to the reference),
    "perplexity", "perplexity_ratio", "kl_divergence": {"mean", "p50", "p90", "p99", "max", ...}, "top1_agreement",
    "accuracy", "flips", "load_s", "peak_load_bytes", "speed": [{"phase", "batch_size", "tokens_per_s"}],
    "efficiency", "details"}], "reference_details", "failed"}.
    """
    from serve.bench import BenchSettings
    from serve.commands.attempts import Attempts
    from serve.commands.terminal import Steps, standard_error
    from serve.compression.recipe import Recipe
    from serve.evaluation import STORIES, Evaluation, Setup

    if plot is not None:
        from serve.evaluation.plot import check

        check(plot)
    parsed, remarks = options.recipes(recipe), standard_error()
    setup = Setup(
        source=source,
        reference=Recipe.parse(reference),
        text=text or STORIES,
        limit=limit,
        reference_source=reference_source,
        device=device,
        calibration=options.calibration(calibration, num_samples, sample_tokens, calibration_seed),
        fresh=fresh,
        threads=threads,
    )
    if text is None and source != "builtin:storyteller":
        remarks.print("No --text: scoring the bundled children's stories, which suit few models")
    evaluation = Evaluation(setup, parsed, BenchSettings(threads=threads) if speed else None)
    attempts = Attempts(evaluation.failed)
    with attempts.all(remarks):
        evaluation.run(Steps((len(parsed) + 1) * (2 if speed else 1), remarks))
    _show(evaluation, details=details, as_json=as_json, as_markdown=as_markdown)
    if plot is not None and evaluation.rows:
        from serve.evaluation.plot import draw

        draw(evaluation.rows, plot)
        remarks.print(f"Plot: {plot}", markup=False)
    attempts.finish()


def _show(evaluation: Evaluation, *, details: bool, as_json: bool, as_markdown: bool) -> None:
    from serve.commands.evaluation_markdown import markdown
    from serve.commands.evaluation_table import print_details, print_tables
    from serve.commands.terminal import print_json, standard_output
    from serve.evaluation.result import plain

    if as_json:
        print_json(plain(evaluation.to_dict()))
    elif as_markdown:
        print(markdown(evaluation))
    elif evaluation.rows:
        print_tables(evaluation, standard_output())
        if details:
            print_details(evaluation, standard_output())
