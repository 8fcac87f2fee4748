"""`halftone distill`: a smaller model that learnt from a larger one."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from serve.commands import learning, options

if TYPE_CHECKING:
    from serve.distillation.distill import Distilled

__all__ = ["distill"]


def distill(
    teacher: Annotated[str, typer.Argument(help="The model to learn from: a folder, a Hub id or builtin:storyteller.")],
    out: Annotated[Path, typer.Option(help="A new folder for the student, a model like any other.")],
    data: learning.Data = None,
    student: Annotated[
        str,
        typer.Option(
            help="How the student is cut out of the teacher, as structured50, depth50 or "
            "depth25+structured25; or the folder of a smaller model to begin with."
        ),
    ] = "structured50",
    layers: Annotated[
        str | None, typer.Option(help="Begin with these of the teacher's layers, as 0,2,5, and cut no further.")
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Batches to learn from.")] = 300,
    batch_size: learning.BatchSize = 8,
    window_tokens: Annotated[int, typer.Option(min=2, help="Tokens of each window of text, at most.")] = 256,
    learning_rate: learning.LearningRate = None,
    temperature: Annotated[float, typer.Option(help="Softens both distributions before they are compared.")] = 2.0,
    soft_weight: Annotated[float, typer.Option(min=0, help="What the teacher's distribution counts.")] = 0.7,
    hard_weight: Annotated[float, typer.Option(min=0, help="What the text itself counts.")] = 0.3,
    sampled: learning.Sampled = None,
    held_out: learning.HeldOut = 32,
    text: learning.MeasuredText = None,
    calibration: options.CalibrationFile = None,
    num_samples: options.NumSamples = 128,
    sample_tokens: options.SampleTokens = None,
    calibration_seed: options.CalibrationSeed = None,
    seed: learning.Seed = 0,
    device: options.Device = "auto",
    as_json: options.AsJson = False,
) -> None:
    """Cut a student out of a teacher, let it learn, and write it as an ordinary checkpoint.

    The loss of a token is soft-weight x T^2 x KL(teacher || student) at temperature T, plus hard-weight x the text's
    own. Interrupted, the same command goes on from its last checkpoint, to the same result.

    Any recipe compresses the student then: `halftone evaluate OUT --recipe int8 --reference-source TEACHER`.

    JSON: {"out", "student", "parameters", "teacher_parameters", "parameters_ratio", "bytes", "before", "after":
    {"kl_divergence", "kl_divergence_interval", "perplexity", "perplexity_ratio", "top1_agreement",
    "accuracy", "accuracy_kept_ratio", "flips", "tokens"}, "recovered_ratio", "settings"}.
    """
    from serve.commands.terminal import print_json
    from serve.distillation.distill import distill as run
    from serve.evaluation.result import plain

    settings = learning.settings(
        steps=steps, batch_size=batch_size, window_tokens=window_tokens, learning_rate=learning_rate,
        temperature=temperature, soft_weight=soft_weight, hard_weight=hard_weight, seed=seed,
    )  # fmt: skip
    samples = options.calibration(calibration, num_samples, sample_tokens, calibration_seed)
    learnt = learning.learnt_text(data, sampled, held_out, text)
    with learning.lessons("distill") as progress:
        found = run(
            teacher, out, learnt, student=student if layers is None else "", layers=_layers(layers),
            settings=settings, calibration=samples, device=device, progress=progress,
        )  # fmt: skip
    if as_json:
        print_json(plain(found.to_dict()))
    else:
        _show(found)


def _layers(text: str | None) -> list[int] | None:
    from serve.errors import ConfigError

    if text is None:
        return None
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError("layers", f"{text!r} is not a list of numbers, as 0,2,5") from None


def _show(found: Distilled) -> None:
    from serve.commands.terminal import size, standard_output

    console = standard_output()
    console.print(learning.distances([("student, as cut", found.before), ("after distillation", found.after)]))
    console.print(
        f"{found.recovered_ratio:.0%} of the lost KL recovered, on {found.after.tokens:,} held-out tokens. "
        f"{found.parameters:,} of {found.teacher_parameters:,} parameters, {size(found.bytes)}, in {found.out}",
        markup=False,
    )
