"""`halftone compress`: a recipe applied once, into the artifact store or into a folder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from serve.commands import gradually, learning, options

if TYPE_CHECKING:
    from rich.table import Table

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
    text: learning.MeasuredText = None,
    held_out: learning.HeldOut = 32,
    learning_rate: learning.LearningRate = None,
    seed: learning.Seed = 0,
    as_json: options.AsJson = False,
) -> None:
    """Compress a model and say what came of it. Interrupted, it goes on from the finished layers next time.

    With --gradual the recipe's pruning is done in steps, and after each the original teaches what is left.

    JSON: the load report, and "out" or "fingerprint". With --gradual {"out", "recipe", "steps": [{"removed",
    "parameters", "before", "after"}], "result", "report", "settings"}, distances as of `distill`.
    """
    from serve.commands.terminal import Steps, print_json, standard_error, standard_output
    from serve.compression.recipe import Recipe
    from serve.errors import SetupError

    if out is None and form != "halftone":
        raise SetupError(f"--format {form} writes something for others to read: say which name it gets with --out")
    parsed, remarks = Recipe.parse(recipe), standard_error()
    samples = options.calibration(calibration, num_samples, sample_tokens, calibration_seed)
    if gradual:
        if out is None or form != "halftone":
            raise SetupError("--gradual makes a new model: say where with --out, and leave --format alone")
        settings = learning.settings(steps=recovery_steps, learning_rate=learning_rate, seed=seed)
        learnt = learning.learnt_text(data, sampled, held_out, text)
        gradually.run(source, parsed, out, learnt, gradual_steps, settings, samples, device, as_json=as_json)
        return
    try:
        with Steps(1, remarks)(parsed.name) as progress:
            if out is None:
                report, name = _into_store(source, parsed, samples, device, fresh, progress)
            else:
                report, name = _into_folder(source, parsed, out, form, samples, device, progress), str(out)
    except KeyboardInterrupt:
        remarks.print("Interrupted: finished layers are kept, and the same command goes on from there")
        raise typer.Exit(130) from None
    if as_json:
        print_json({**report.to_dict(), ("out" if out is not None else "fingerprint"): name})
    else:
        standard_output().print(_table(report, name))


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
    for layer, reason in report.uncovered.items():
        table.add_row("not compressed", f"{layer}: {reason}")
    return table
