"""What the commands that train share: the text, how fast to learn, and how far from the teacher one is."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.table import Table

    from serve.distillation.held_out import Distance
    from serve.distillation.school import Text
    from serve.distillation.settings import Settings
    from serve.fresh_process import Progress

__all__ = [
    "BatchSize",
    "Data",
    "HeldOut",
    "LearningRate",
    "MeasuredText",
    "Sampled",
    "Seed",
    "distances",
    "learnt_text",
    "lessons",
    "settings",
]

Data = Annotated[
    Path | None,
    typer.Option(help="Text or JSONL to learn from. Default: what the teacher writes itself (see --sampled)."),
]
Sampled = Annotated[
    int | None,
    typer.Option(min=0, help="Texts that the teacher writes to learn from. Default: 0 with --data, else 1000."),
]
MeasuredText = Annotated[Path | None, typer.Option(help="Measure on this text instead of on the end of --data.")]
HeldOut = Annotated[int, typer.Option(min=1, help="Records at the end of the text that are only measured.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Windows of text in each step.")]
LearningRate = Annotated[float | None, typer.Option(help="The highest one. Default: 0.4 / the model's width.")]
Seed = Annotated[int, typer.Option(help="Decides the order of the text, and what the teacher writes.")]


def settings(**options: Any) -> Settings:
    from serve.distillation.settings import Settings

    return Settings(**options)


def learnt_text(data: Path | None, sampled: int | None, held_out: int, measured: Path | None) -> Text:
    """What the options say about the text."""
    from serve.distillation.school import Text

    count = (1000 if data is None else 0) if sampled is None else sampled
    return Text(data, count, held_out, measured)


@contextmanager
def lessons(name: str) -> Iterator[Progress]:
    """The progress of long lessons; interrupted, they are told to be safe."""
    from serve.commands.terminal import Steps, standard_error

    remarks = standard_error()
    try:
        with Steps(1, remarks)(name) as progress:
            yield progress
    except KeyboardInterrupt:
        remarks.print("Interrupted: the same command goes on from the last checkpoint")
        raise typer.Exit(130) from None


def distances(rows: list[tuple[str, Distance]]) -> Table:
    """One line for each moment that was measured."""
    from rich.table import Table

    table = Table("", box=None, header_style="bold", pad_edge=False)
    for title in ("KL mean [95 %]", "perplexity", "ratio", "same top", "accuracy kept"):
        table.add_column(title, justify="right")
    for name, found in rows:
        low, high = found.kl_divergence_interval
        table.add_row(
            name,
            f"{found.kl_divergence:.4f} [{low:.4f}, {high:.4f}]",
            f"{found.perplexity:.3f}",
            f"{found.perplexity_ratio:.4f}",
            f"{100 * found.top1_agreement:.1f} %",
            f"{100 * found.accuracy_kept_ratio:.1f} %",
        )
    return table
