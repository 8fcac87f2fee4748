"""An evaluation as the Markdown tables of docs/COMPRESSION.md: quality and size, then speed and efficiency."""

from __future__ import annotations

from serve.evaluation.evaluation import Evaluation
from serve.evaluation.result import Row

__all__ = ["markdown"]

_QUALITY = (
    "recipe", "bits/weight", "bytes", "× smaller", "KL mean [95 %]", "Δppl", "same top", "accuracy kept", "flips",
)  # fmt: skip


def markdown(evaluation: Evaluation) -> str:
    """Both tables; the second only where speed was measured."""
    rows, reference = evaluation.rows, evaluation.reference
    lines = [*_table(_QUALITY, [_quality(row) for row in rows])]
    if reference is not None:
        lines.insert(0, f"Reference {reference.recipe}: perplexity {reference.perplexity['value']:.3f} ± "
                        f"{reference.perplexity['standard_error']:.3f}, accuracy {100 * reference.accuracy:.2f} %, "
                        f"{reference.total_bytes:,} bytes, {reference.tokens:,} tokens.\n")  # fmt: skip
    timed = [row for row in rows if row.bench is not None]
    if timed:
        lines += ["", *_table(_speed_titles(timed[0]), [_speed(row) for row in timed])]
    return "\n".join(lines)


def _quality(row: Row) -> list[str]:
    found = row.quality.divergence
    low, high = found["kl_divergence_interval"]
    digits = 5 if high < 0.003 else 4 if high < 0.1 else 3
    change, error = 100 * (found["perplexity_ratio"] - 1), 100 * found["perplexity_ratio_standard_error"]
    return [
        f"`{row.recipe}`",
        f"{row.quality.report['bits_per_weight']:.2f}",
        f"{row.bytes:,}",
        f"{row.compression_ratio:.2f}",
        f"{row.kl_divergence:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]",
        f"{change:+.2f} ± {error:.2f} %",
        f"{100 * found['top1_agreement']:.1f} %",
        f"{100 * row.accuracy_kept_ratio:.1f} %",
        f"{100 * found['accuracy']['flips']:.1f} %",
    ]


def _speed_titles(row: Row) -> list[str]:
    assert row.bench is not None
    measured = [f"{speed.phase} {speed.batch_size}, tok/s" for speed in row.bench.speed]
    return ["recipe", *measured, "× faster (decode 1)", "load s", "peak load, MB", "efficiency"]


def _speed(row: Row) -> list[str]:
    assert row.bench is not None
    report = row.quality.report
    return [
        f"`{row.recipe}`",
        *(f"{speed.tokens_per_s:,.0f}" for speed in row.bench.speed),
        "-" if row.speedup is None else f"{row.speedup:.2f}",
        f"{report['load_s']:.2f}",
        f"{report['peak_load_bytes'] / 1e6:.0f}",
        "-" if row.efficiency is None else f"{row.efficiency:.2f}",
    ]


def _table(titles: tuple[str, ...] | list[str], rows: list[list[str]]) -> list[str]:
    return [_line(titles), "|" + "---|" * len(titles), *map(_line, rows)]


def _line(cells: tuple[str, ...] | list[str]) -> str:
    return "| " + " | ".join(cells) + " |"
