"""An evaluation for a person: two tables that fit a terminal, and on request all that llama.cpp's tool would print."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

from serve.commands.terminal import size
from serve.evaluation.evaluation import Evaluation
from serve.evaluation.pareto import front
from serve.evaluation.result import Reference, Row

__all__ = ["print_details", "print_tables"]

_ERRORS = "± one standard error over tokens (of the ratio: paired); [95 %, bootstrapped over records]; KL in nats"
_EFFICIENCY = "efficiency = accuracy kept x times smaller x speed-up of one decoding sequence; the reference has 1"


def print_tables(evaluation: Evaluation, console: Console) -> None:
    """Quality, then cost; the reference and the noise floor stand below, for they say what a figure means."""
    assert evaluation.reference is not None
    console.print(_quality(evaluation.rows))
    console.print(_facts(evaluation.reference), style="dim", markup=False)
    console.print()
    console.print(_cost(evaluation.rows))
    console.print(_footnote(evaluation.rows), style="dim", markup=False)


def _quality(rows: list[Row]) -> Table:
    table = _new_table("recipe", "perplexity", "ratio", "KL mean", "KL p99", "same top", "accuracy", "flips", "RMS Δp")
    for row in rows:
        found = row.quality.divergence
        kl = found["kl_divergence"]
        low, high = found["kl_divergence_interval"]
        table.add_row(
            row.recipe,
            _with_error(found["perplexity_variant"]["value"], found["perplexity_variant"]["standard_error"], 3),
            _with_error(found["perplexity_ratio"], found["perplexity_ratio_standard_error"], 4),
            f"{kl['mean']:.5f} [{low:.5f}, {high:.5f}]",
            f"{kl['p99']:.4f}",
            _percent(found["top1_agreement"], found["top1_agreement_standard_error"], 2),
            f"{100 * found['accuracy']['variant']:.2f} %",
            f"{100 * found['accuracy']['flips']:.2f} %",
            f"{100 * found['rms_delta_p']:.2f} %",
        )
    return table


def _cost(rows: list[Row]) -> Table:
    bench = next((row.bench for row in rows if row.bench is not None), None)
    speeds = [(speed.phase, speed.batch_size) for speed in bench.speed] if bench else []
    table = _new_table("recipe", "bits/weight", "bytes", "smaller", "load s", "peak load")
    for phase, batch_size in speeds:
        table.add_column(f"{phase} {batch_size}, tok/s", justify="right")
    table.add_column("efficiency", justify="right")
    best = {rows[index].recipe for index in front([(row.bytes, row.kl_divergence) for row in rows])}
    for row in rows:
        report = row.quality.report
        found = [row.bench.tokens_per_s(*speed) if row.bench else None for speed in speeds]
        table.add_row(
            row.recipe + (" ◆" if row.recipe in best else ""),
            f"{report['bits_per_weight']:.2f}",
            size(row.bytes),
            f"{row.compression_ratio:.2f}x",
            f"{report['load_s']:.2f}{'*' if report['artifact_hit'] else ''}",
            size(report["peak_load_bytes"]),
            *(_number(value, ",.0f") for value in found),
            _number(row.efficiency, ".2f"),
        )
    return table


def _facts(reference: Reference) -> str:
    perplexity, noise = reference.perplexity, reference.noise_floor
    lines = [
        f"Reference {reference.recipe}: perplexity {perplexity['value']:.3f} ± {perplexity['standard_error']:.3f}, "
        f"accuracy {100 * reference.accuracy:.2f} %, on {reference.tokens:,} tokens of {len(reference.records)} records"
    ]
    if noise is not None:
        lines.append(
            f"Noise floor (the same weights computed in {noise['dtype']}): KL {noise['kl_divergence']:.2g}, "
            f"same top {100 * noise['top1_agreement']:.2f} %"
        )
    return "\n".join([*lines, _ERRORS])


def _footnote(rows: list[Row]) -> str:
    lines = ["◆ no recipe here is both smaller and closer to the reference"]
    if any(row.quality.report["artifact_hit"] for row in rows):
        lines.append("* from the artifact store; --fresh shows what compressing takes")
    return "\n".join([*lines, _EFFICIENCY])


def print_details(evaluation: Evaluation, console: Console) -> None:
    """Every statistic of llama.cpp's `--kl-divergence`, in its order and under its names."""
    for row in evaluation.rows:
        console.print(f"\n{row.recipe}", style="bold", markup=False)
        for name, value in _statistics(row.quality.divergence):
            console.print(f"  {name:28} {value}", markup=False)


def _statistics(found: Mapping[str, Any]) -> list[tuple[str, str]]:
    p, q, accuracy = found["perplexity_reference"], found["perplexity_variant"], found["accuracy"]
    return [
        ("Mean PPL(Q)", _with_error(q["value"], q["standard_error"], 6)),
        ("Mean PPL(base)", _with_error(p["value"], p["standard_error"], 6)),
        ("Cor(ln(PPL(Q)), ln(PPL(base)))", f"{100 * found['ln_perplexity_correlation']:.2f} %"),
        ("Mean ln(PPL(Q)/PPL(base))", _with_error(found["mean_ln_ratio"], found["mean_ln_ratio_standard_error"], 6)),
        ("Mean PPL(Q)/PPL(base)", _with_error(found["perplexity_ratio"], found["perplexity_ratio_standard_error"], 6)),
        (
            "Mean PPL(Q)-PPL(base)",
            _with_error(found["perplexity_difference"], found["perplexity_difference_standard_error"], 6),
        ),
        *_spread("KLD", found["kl_divergence"], 1.0, ""),
        *_spread("Δp", found["delta_p"], 100.0, " %"),
        ("RMS Δp", _percent(found["rms_delta_p"], found["rms_delta_p_standard_error"], 3)),
        (
            "Same top p",
            _percent(found["top1_agreement"], found["top1_agreement_standard_error"], 3),
        ),
        ("Accuracy (Q), (base)", f"{100 * accuracy['variant']:.3f} %, {100 * accuracy['reference']:.3f} %"),
        ("Flips (lost, gained)", f"{100 * accuracy['lost']:.3f} %, {100 * accuracy['gained']:.3f} %"),
        ("Tokens, not finite", f"{found['tokens']:,}, {found['non_finite_tokens']:,}"),
    ]


def _spread(name: str, values: Mapping[str, float], scale: float, unit: str) -> list[tuple[str, str]]:
    titles = {
        "max": f"Maximum {name}", "p99_9": f"99.9% {name}", "p99": f"99.0% {name}", "p95": f"95.0% {name}",
        "p90": f"90.0% {name}", "median": f"Median {name}", "p10": f"10.0% {name}", "p5": f"5.0% {name}",
        "p1": f"1.0% {name}", "p0_1": f"0.1% {name}", "min": f"Minimum {name}",
    }  # fmt: skip
    mean = _with_error(scale * values["mean"], scale * values["standard_error"], 6) + unit
    return [(f"Mean {name}", mean), *((title, f"{scale * values[key]:.6f}{unit}") for key, title in titles.items())]


def _new_table(first: str, *others: str) -> Table:
    table = Table(first, box=None, header_style="bold", pad_edge=False)
    for title in others:
        table.add_column(title, justify="right")
    return table


def _with_error(value: float, error: float, digits: int) -> str:
    return f"{value:.{digits}f} ± {error:.{digits}f}"


def _percent(share: float, error: float, digits: int) -> str:
    return _with_error(100 * share, 100 * error, digits) + " %"


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else f"{value:{form}}"
