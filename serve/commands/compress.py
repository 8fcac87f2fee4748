"""`halftone compress`: a recipe applied once, into the artifact store or into a folder."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from serve.commands import gradually, learning, options

if TYPE_CHECKING:
    from rich.table import Table

    from serve.commands.terminal import Steps
    from serve.compression.calibration import Calibration
    from serve.compression.recipe import Recipe
    from serve.compression.report import LoadReport
    from serve.fresh_process import Progress

__all__ = ["compress"]


def compress(
    source: options.Source,
    recipe: Annotated[str, typer.Option(help="What to do to the weights, as gptq4-g64 or wanda50+int8.")],
    out: Annotated[
        Path | None, typer.Option(help="A new folder (with gguf, a new file). Default: the artifact store.")
    ] = None,
    calibration: options.CalibrationFile = None,
    num_samples: options.NumSamples = 128,
    sample_tokens: options.SampleTokens = None,
    calibration_seed: options.CalibrationSeed = None,
    form: Annotated[
        Literal["halftone", "gptq", "gguf"],
        typer.Option(
            "--format",
            help="With --out: ours, a model like any other; gptq for transformers, GPTQModel and vLLM; or gguf for "
            "llama.cpp (Q8_0 of int8 and 8-bit recipes, Q4_0 of symmetric 4-bit ones).",
        ),
    ] = "halftone",
    device: options.Device = "auto",
    fresh: options.Fresh = False,
    gradual: gradually.Gradual = False,
    gradual_steps: gradually.GradualSteps = 3,
    recovery_steps: gradually.RecoverySteps = 100,
    data: learning.Data = None,
    sampled: learning.Sampled = None,
    text: Annotated[
        Path | None,
        typer.Option(
            help="Measure the quality on this text, and note it in the manifest. With --gradual: measure on this "
            "instead of on the end of --data."
        ),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Measure on the first records of --text only; --held-out with --gradual.")
    ] = None,
    held_out: learning.HeldOut = 32,
    learning_rate: learning.LearningRate = None,
    seed: learning.Seed = 0,
    as_json: options.AsJson = False,
) -> None:
    """Compress a model and say what came of it. Interrupted, it goes on from the finished layers next time.

    With --text the result is measured against the source in fp32, and its manifest tells whoever loads it.
    With --gradual the recipe's pruning is done in steps, and after each the original teaches what is left.

    JSON: the load report, and "out" or "fingerprint"; with --text, the report's "quality" is {"reference", "tokens",
    "kl_divergence", "top1_agreement", "perplexity_ratio", "accuracy", "flips"}. With --gradual {"out", "recipe",
    "steps": [{"removed", "parameters", "before", "after"}], "result", "report", "settings"}, distances as of `distill`.
    """
    from serve.commands.terminal import Steps, print_json, standard_error, standard_output
    from serve.compression.recipe import Recipe
    from serve.errors import SetupError

    if out is None and form != "halftone":
        raise SetupError(f"--format {form} writes something for others to read: say which name it gets with --out")
    parsed, remarks = Recipe.parse(recipe), standard_error()
    samples = options.calibration(calibration, num_samples, sample_tokens, calibration_seed)
    if gradual:
        if limit is not None:
            raise SetupError("--limit: with --gradual, say with --held-out how many records are measured")
        if out is None or form != "halftone":
            raise SetupError("--gradual makes a new model: say where with --out, and leave --format alone")
        settings = learning.settings(steps=recovery_steps, learning_rate=learning_rate, seed=seed)
        learnt = learning.learnt_text(data, sampled, held_out, text)
        gradually.run(source, parsed, out, learnt, gradual_steps, settings, samples, device, as_json=as_json)
        return
    _check_noted(text, limit, form, fresh=fresh and out is None)
    steps = Steps(1 if text is None else 3, remarks)
    try:
        with steps(parsed.name) as progress:
            if out is None:
                report, name = _into_store(source, parsed, samples, device, fresh, progress)
            else:
                report, name = _into_folder(source, parsed, out, form, samples, device, progress), str(out)
        if text is not None:
            report = _with_quality(report, source, parsed, out, text, limit, samples, device, steps)
    except KeyboardInterrupt:
        remarks.print("Interrupted: finished layers are kept, and the same command goes on from there")
        raise typer.Exit(130) from None
    if as_json:
        print_json({**report.to_dict(), ("out" if out is not None else "fingerprint"): name})
    else:
        standard_output().print(_table(report, name))


def _check_noted(text: Path | None, limit: int | None, form: str, *, fresh: bool) -> None:
    """Refuse to measure what has no manifest, before any work is done."""
    from serve.errors import ConfigError

    if text is None and limit is not None:
        raise ConfigError("limit", "is of --text: name the text to measure on")
    if text is not None and not text.is_file():
        raise ConfigError("text", f"{text}: no such text file")
    if text is not None and (fresh or form != "halftone"):
        why = "--fresh keeps nothing" if fresh else f"--format {form} has no manifest"
        raise ConfigError("text", f"{why} to note quality in; measure with `halftone evaluate` instead")


def _with_quality(
    report: LoadReport,
    source: str,
    recipe: Recipe,
    out: Path | None,
    text: Path,
    limit: int | None,
    calibration: Calibration | None,
    device: str,
    steps: Steps,
) -> LoadReport:
    from serve.compression.recipe import Recipe
    from serve.evaluation import Setup
    from serve.evaluation.noting import note_quality

    setup = Setup(source, Recipe.parse("fp32"), text, limit, device=device, calibration=calibration)
    return replace(report, quality=note_quality(setup, recipe, out, steps))


def _into_store(
    source: str, recipe: Recipe, text: Calibration | None, device: str, fresh: bool, progress: Progress
) -> tuple[LoadReport, str]:
    from serve.compression.artifact import default_root
    from serve.loading import load

    artifacts = None if fresh else default_root()
    loaded = load(source, recipe, device=device, calibration=text, artifacts=artifacts, progress=progress)
    return loaded.report, loaded.fingerprint


def _into_folder(
    source: str,
    recipe: Recipe,
    out: Path,
    form: Literal["halftone", "gptq", "gguf"],
    text: Calibration | None,
    device: str,
    progress: Progress,
) -> LoadReport:
    from serve.saving import compress_to

    return compress_to(source, recipe, out, format=form, calibration=text, device=device, progress=progress)


def _table(report: LoadReport, name: str) -> Table:
    from rich.table import Table

    from serve.commands.terminal import size

    ratios = f"{report.compression_ratio:.2f} than 16 bit, {report.compression_ratio_fp32:.2f} than 32 bit"
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold")
    for title, value in (
        ("recipe", report.recipe),
        ("kept as", name),
        ("bytes", f"{report.total_bytes:,} ({size(report.total_bytes)})"),
        ("of these", f"weights {report.weight_bytes:,}, scales and tables {report.quantization_bytes:,}, "
                     f"embeddings {report.embedding_bytes:,}"),
        ("bits per weight", f"{report.bits_per_weight:.3f} (decoder layers, scales counted)"),
        ("times smaller", ratios),
        ("seconds", ", ".join(f"{stage} {seconds:.2f}" for stage, seconds in report.seconds.items())),
        ("peak memory", f"{size(report.peak_load_bytes)} above what the program itself takes; of calibration "
                        f"{size(report.activation_bytes)} activations, {size(report.hessian_bytes)} Hessians"),
        ("multiplied by", ", ".join(f"{kernel}: {count} layers" for kernel, count in report.kernels.items())),
        ("artifact", "was there already" if report.artifact_hit else "made now"),
    ):  # fmt: skip
        table.add_row(title, value)
    if report.quality:
        table.add_row("quality", _told(report.quality))
    for layer, reason in report.uncovered.items():
        table.add_row("not compressed", f"{layer}: {reason}")
    return table


def _told(quality: dict[str, Any]) -> str:
    return (
        f"KL {quality['kl_divergence']:.4f}, perplexity x {quality['perplexity_ratio']:.4f}, same top "
        f"{quality['top1_agreement']:.1%}, flips {quality['flips']:.1%} ({quality['tokens']:,} tokens, against "
        f"{quality['reference']})"
    )
