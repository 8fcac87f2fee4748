"""`halftone bench`: the engine's speed in process."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from serve.commands import options

if TYPE_CHECKING:
    from rich.table import Table

    from serve.bench import Bench, BenchSettings

__all__ = ["bench"]


def bench(
    source: options.Source,
    recipe: options.Recipes,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Length of each prompt.")] = 128,
    decode_tokens: Annotated[int, typer.Option(min=2, help="Output tokens of each sequence.")] = 64,
    batch_size: Annotated[
        list[int] | None, typer.Option(min=1, help="Sequences decoding together (repeatable). Default: 1 8 16.")
    ] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Counted runs of each; the median is shown.")] = 5,
    calibration: options.CalibrationFile = None,
    num_samples: options.NumSamples = 128,
    sample_tokens: options.SampleTokens = None,
    calibration_seed: options.CalibrationSeed = None,
    device: options.Device = "auto",
    threads: options.Threads = None,
    fresh: options.Fresh = False,
    as_json: options.AsJson = False,
) -> None:
    """Time the engine in process: prefill, decode by batch size, memory and load, each recipe in a process of its own.

    Tokens per second are those of all sequences together. Prefill is the time to one prompt's first token; decode is
    counted while the whole batch decodes. Prompts are random tokens. Close other programs: they halve every figure.

    JSON: {"source", "prompt_tokens", "decode_tokens", "repeats", "machine", "rows": [{"recipe", "path", "load_s",
    "bytes", "resident_bytes", "peak_bytes", "speed": [{"phase", "batch_size", "tokens_per_s"}], ...}]}.
    """
    from serve.bench import BenchSettings, run_bench
    from serve.commands.attempts import Attempts
    from serve.commands.terminal import Steps, standard_error

    parsed = options.recipes(recipe)
    text = options.calibration(calibration, num_samples, sample_tokens, calibration_seed)
    settings = BenchSettings(prompt_tokens, decode_tokens, tuple(batch_size or (1, 8, 16)), repeats, threads)
    step, attempts = Steps(len(parsed), standard_error()), Attempts()
    rows: list[Bench] = []
    with attempts.all(standard_error()):
        for one in parsed:
            with attempts.one(one.name), step(one.name) as tell:
                rows.append(run_bench(source, one, settings, tell, device=device, calibration=text, fresh=fresh))
    _show(source, settings, rows, as_json=as_json)
    attempts.finish()


def _show(source: str, settings: BenchSettings, rows: list[Bench], *, as_json: bool) -> None:
    from serve.bench.machine import machine
    from serve.commands.terminal import print_json, standard_output

    if not as_json:
        if rows:
            standard_output().print(_table(rows))
        return
    print_json(
        {
            "source": source,
            "prompt_tokens": settings.prompt_tokens,
            "decode_tokens": settings.decode_tokens,
            "repeats": settings.repeats,
            "machine": machine(),
            "rows": [row.to_dict() for row in rows],
        }
    )


def _table(rows: list[Bench]) -> Table:
    from rich.table import Table

    from serve.commands.terminal import size

    speeds = [(speed.phase, speed.batch_size) for speed in rows[0].speed]
    table = Table("recipe", "path", box=None, header_style="bold", pad_edge=False, caption_justify="left")
    for phase, batch_size in speeds:
        table.add_column(f"{phase} {batch_size}, tok/s", justify="right")
    for title in ("model", "resident", "peak", "load s", "ready s"):
        table.add_column(title, justify="right")
    for row in rows:
        found = [row.tokens_per_s(phase, batch_size) for phase, batch_size in speeds]
        table.add_row(
            row.recipe,
            row.path.partition(":")[0],
            *("-" if value is None else f"{value:,.0f}" for value in found),
            *(size(row.total_bytes), size(row.resident_bytes), size(row.peak_bytes)),
            f"{row.load_s:.2f}{'*' if row.artifact_hit else ''}",
            f"{row.ready_s:.2f}",
        )
    if any(row.artifact_hit for row in rows):
        table.caption = "* from the artifact store"
    return table
