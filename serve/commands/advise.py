"""`halftone advise`: the recipe for a memory, a device and a floor, with what was measured."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from serve.commands import options

if TYPE_CHECKING:
    from rich.table import Table

    from serve.advice import Advice

__all__ = ["advise"]


def advise(
    source: options.Source,
    memory: Annotated[str, typer.Option(help="What the device has for it, as 8GiB or 512MB.")],
    device: Annotated[
        Literal["cuda", "cpu", "edge", "phone"], typer.Option(help="A server's GPU or CPU, or a small device.")
    ] = "cpu",
    floor: Annotated[float, typer.Option(help="The least share of the reference's accuracy to keep.")] = 0.97,
    max_kl: Annotated[float | None, typer.Option(help="The most KL divergence allowed, in nats per token.")] = None,
    sequences: Annotated[
        int | None, typer.Option(min=1, help="Sequences of full context to fit. Default: 8 on servers, else 1.")
    ] = None,
    recipe: Annotated[
        list[str] | None, typer.Option(help="A candidate (repeatable). Default: what is usual on such a device.")
    ] = None,
    student: Annotated[
        list[str] | None, typer.Option(help="A model distilled from the source, to consider as well (repeatable).")
    ] = None,
    text: Annotated[
        Path | None, typer.Option(help="JSONL or plain text to score. Default: 48 bundled children's stories.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Score the first records of the text only.")] = None,
    calibration: options.CalibrationFile = None,
    num_samples: options.NumSamples = 128,
    sample_tokens: options.SampleTokens = None,
    calibration_seed: options.CalibrationSeed = None,
    speed: Annotated[bool, typer.Option(help="Time the candidates of a server.")] = True,
    threads: options.Threads = None,
    fresh: options.Fresh = False,
    as_json: options.AsJson = False,
) -> None:
    """Measure candidates on this model and recommend one; say what is ruled out, and why.

    Of those that fit the memory and keep the floor, a server gets the fastest (eight sequences decoding), a small
    device the smallest; among those within 5 % of it the closest to the reference. Ends with exit code 1 where there
    is none.

    JSON: {"source", "device", "memory_bytes", "floor_ratio", "max_kl", "sequences", "reference", "recommended",
    "candidates": [{"recipe", "source", "verdict": "recommended|suitable|ruled out", "reason", "bytes", "needed_bytes",
    "kl_divergence", "accuracy_kept_ratio", "flips", "tokens_per_s", "efficiency"}], "rule_of_thumb", "follows_rule",
    "remarks"}.
    """
    from serve.advice import Target
    from serve.advice import advise as run
    from serve.advice.target import parse_bytes
    from serve.bench import BenchSettings
    from serve.commands.attempts import Attempts
    from serve.commands.terminal import Steps, print_json, standard_error
    from serve.compression.recipe import Recipe
    from serve.evaluation import STORIES, Setup
    from serve.evaluation.result import plain

    server = device in ("cuda", "cpu")
    target = Target(device, parse_bytes(memory), floor, max_kl, sequences or (8 if server else 1))
    setup = Setup(
        source=source, reference=Recipe.parse("fp32"), text=text or STORIES, limit=limit, threads=threads, fresh=fresh,
        calibration=options.calibration(calibration, num_samples, sample_tokens, calibration_seed),
    )  # fmt: skip
    remarks = standard_error()
    if text is None and source != "builtin:storyteller":
        remarks.print("No --text: scoring the bundled children's stories, which suit few models")
    bench = BenchSettings(batch_sizes=(1, 8), repeats=3, threads=threads) if speed else None
    advice, attempts = None, Attempts()
    with attempts.all(remarks):
        advice = run(
            setup, target, Steps(1, remarks), recipes=options.recipes(recipe or []), students=student or (),
            bench=bench, has_gpu=_has_gpu(),
        )  # fmt: skip
    attempts.finish()
    assert advice is not None
    if as_json:
        print_json(plain(advice.to_dict()))
    else:
        _show(advice)
    if advice.recommended is None:
        raise typer.Exit(1)


def _has_gpu() -> bool:
    """Without loading torch here."""
    from shutil import which

    return which("nvidia-smi") is not None


def _show(advice: Advice) -> None:
    from serve.commands.terminal import size, standard_output

    console, target = standard_output(), advice.target
    console.print(_table(advice))
    best = advice.recommended
    asked = f"{target.traits.title}, {size(target.memory_bytes)}, floor {target.floor_ratio:.1%}"
    console.print(f"For {asked}: {best.recipe if best else 'nothing'}", style="bold", markup=False)
    if best is not None:
        told = "as the rule of thumb has it" if advice.follows_rule else "against the rule of thumb"
        where = "" if best.source == advice.source else f" (of {best.source})"
        console.print(f"{best.reason}{where}; {told} ({', '.join(target.traits.rule)})", markup=False)
    for remark in advice.remarks:
        console.print(remark, style="dim", markup=False)


def _table(advice: Advice) -> Table:
    from rich.table import Table

    from serve.commands.terminal import size

    table = Table("recipe", "verdict", box=None, header_style="bold", pad_edge=False)
    for title in ("needs", "KL mean", "accuracy kept", "flips", "tok/s"):
        table.add_column(title, justify="right")
    table.add_column("why")
    for verdict in advice.verdicts:
        one = verdict.candidate
        name = verdict.recipe if verdict.source == advice.source else f"{verdict.recipe} of {verdict.source}"
        numbers = ["-"] * 5 if one is None else [
            size(one.needed_bytes), f"{one.kl_divergence:.4f}", f"{one.accuracy_kept_ratio:.1%}", f"{one.flips:.1%}",
            "-" if one.tokens_per_s is None else f"{one.tokens_per_s:,.0f}",
        ]  # fmt: skip
        table.add_row(name, verdict.verdict, *numbers, verdict.reason)
    return table
