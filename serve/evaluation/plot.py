"""Quality against bytes and against speed, with the Pareto front drawn. Needs matplotlib: the extra `plot`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from serve.errors import ConfigError, SetupError
from serve.evaluation.pareto import front
from serve.evaluation.result import Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["check", "draw"]

_LEAST_KL_NATS = 1e-6
"""Lower than any text can tell; the scale is logarithmic, and the reference itself has 0."""
_POINT, _FRONT = "#0072B2", "#D55E00"  # Okabe and Ito's, which colour-blind readers can tell apart


def check(file: Path) -> None:
    """Raise a `SetupError` before anything is measured for a plot that could not be drawn."""
    if find_spec("matplotlib") is None:
        raise SetupError("--plot needs matplotlib, which is not installed: pip install 'halftone[plot]'")
    if file.suffix not in (".png", ".svg", ".pdf"):
        raise ConfigError("plot", f"{file}: the name must end in .png, .svg or .pdf")
    if not file.parent.is_dir():
        raise ConfigError("plot", f"{file}: {file.parent} is no folder")


def draw(rows: Sequence[Row], file: Path) -> None:
    """One panel for bytes and, where speed was measured, one for decode tokens per second."""
    from matplotlib.figure import Figure

    timed = [row for row in rows if row.tokens_per_s is not None]
    figure = Figure(figsize=(12 if timed else 6.5, 5), layout="constrained")
    axes = list(figure.subplots(1, 2 if timed else 1, sharey=True, squeeze=False).flat)
    _panel(axes[0], rows, lambda row: row.bytes / 1e6, +1)
    axes[0].set(xlabel="model, MB (less is better)", ylabel="mean KL divergence, nats (less is better)", yscale="log")
    if timed:
        _panel(axes[1], timed, lambda row: row.tokens_per_s or 0.0, -1)
        axes[1].set(xlabel="decode of one sequence, tokens/s (more is better)")
    for panel in axes:
        if (noise := rows[0].reference.noise_floor) is not None and noise["kl_divergence"] > _LEAST_KL_NATS:
            panel.axhspan(_LEAST_KL_NATS, noise["kl_divergence"], color="0.9", label="below the noise floor", zorder=0)
        panel.grid(alpha=0.3)
        panel.legend(fontsize="small")
    figure.suptitle(f"Against {rows[0].reference.recipe}, {rows[0].reference.tokens:,} tokens")
    figure.savefig(file, dpi=150)


def _panel(axes: Axes, rows: Sequence[Row], cost: Callable[[Row], float], sign: int) -> None:
    """`sign` is +1 where less of the cost is better, -1 where more is."""
    points = [(sign * cost(row), row.kl_divergence) for row in rows]
    shown = [(sign * x, max(y, _LEAST_KL_NATS)) for x, y in points]
    best = [shown[index] for index in front(points)]
    axes.plot([x for x, _ in best], [y for _, y in best], color=_FRONT, lw=1.2, label="Pareto front", zorder=1)
    axes.scatter([x for x, _ in shown], [y for _, y in shown], color=_POINT, s=28, zorder=2)
    for row, at in zip(rows, shown, strict=True):
        axes.annotate(row.recipe, at, xytext=(5, 5), textcoords="offset points", fontsize="small")
