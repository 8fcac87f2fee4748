"""Results as tables in a terminal."""

from collections.abc import Iterable

from rich.console import Console
from rich.table import Table
from rich.text import Text

from loadtest.results import Json

METRICS = {
    "ttft_s": "TTFT",
    "itl_s": "ITL",
    "tpot_s": "TPOT",
    "e2e_s": "E2E",
    "queue_s": "queue",
}
VERDICT_STYLES = {"better": "green", "worse": "red"}
COLUMNS = {"mean": "mean", "p50": "p50", "p90": "p90", "p99": "p99", "p999": "p99.9", "max": "max"}


def print_run(result: Json, console: Console) -> None:
    """Latencies, rates and what to know about them, overall and by variant."""
    if "stages" in result:
        console.print(_stages(result))
    console.print(_latencies("overall", result["overall"]))
    console.print(_rates({"overall": result["overall"], **result["by_variant"]}))
    if result["by_variant"]:
        console.print(_variants(result["by_variant"]))
    for kind, example in result["overall"]["error_examples"].items():
        console.print(Text(f"{kind}: {example}"))
    for line in _verdicts(result):
        console.print(Text(line))


def milliseconds(value_s: float | None) -> str:
    """Three significant digits, in ms; – where there is none."""
    if value_s is None:
        return "–"
    return f"{value_s * 1e3:.3g}" if value_s < 1 else f"{value_s * 1e3:.0f}"


def _latencies(name: str, group: Json) -> Table:
    table = Table(title=f"{name}: milliseconds, with 95 % intervals")
    table.add_column("metric")
    table.add_column("n", justify="right")
    for title in COLUMNS.values():
        table.add_column(title, justify="right")
    for metric, title in METRICS.items():
        values = group[metric]
        table.add_row(title, str(values["count"]), *(_with_interval(values, column) for column in COLUMNS))
    return table


def _variants(groups: dict[str, Json]) -> Table:
    """p50 and p99 side by side; the JSON and the report have the rest."""
    table = Table("variant", title="by variant: milliseconds, p50 and p99")
    for title in METRICS.values():
        table.add_column(title, justify="right")
    for name, group in groups.items():
        pairs = ((group[metric]["p50"], group[metric]["p99"]) for metric in METRICS)
        table.add_row(name, *(f"{milliseconds(p50)} · {milliseconds(p99)}" for p50, p99 in pairs))
    return table


def _with_interval(values: Json, column: str) -> str:
    interval = values["intervals"].get(column)
    middle = milliseconds(values[column])
    if interval is None:
        return middle
    return f"{middle}\n[dim]{milliseconds(interval[0])}–{milliseconds(interval[1])}[/dim]"


def _rates(groups: dict[str, Json]) -> Table:
    titles = (
        "",
        "requests",
        "requests/s",
        "tokens/s",
        "good",
        "good requests/s",
        "errors",
        "prompt tokens",
        "answer",
    )
    table = Table(*titles)
    for name, group in groups.items():
        table.add_row(
            name,
            f"{group['requests']['succeeded']} of {group['requests']['measured']}",
            f"{group['requests_per_s']:.3g}",
            f"{group['tokens_per_s']:.4g}",
            percent(group["goodput_ratio"]),
            f"{group['goodput_requests_per_s']:.3g}",
            ", ".join(f"{kind} {count}" for kind, count in group["errors"].items()) or "none",
            _mean(group["prompt_tokens"]),
            _mean(group["completion_tokens"]),
        )
    return table


def _stages(result: Json) -> Table:
    table = Table(
        "offered",
        "requests/s",
        "tokens/s",
        "TTFT p99 ms",
        "E2E p50 ms",
        "E2E p99 ms",
        "good",
        "",
        title="stages",
    )
    marks = {"highest_meeting_slo": "highest within SLO", "knee": "knee"}
    for number, stage in enumerate(result["stages"]):
        group = stage["overall"]
        found = [text for key, text in marks.items() if (result[key] or {}).get("stage") == number]
        table.add_row(
            ", ".join(f"{name} {_short(value)}" for name, value in stage["offered"].items() if name != "loop"),
            f"{group['requests_per_s']:.3g}",
            f"{group['tokens_per_s']:.4g}",
            milliseconds(group["ttft_s"]["p99"]),
            milliseconds(group["e2e_s"]["p50"]),
            milliseconds(group["e2e_s"]["p99"]),
            percent(group["goodput_ratio"]),
            ", ".join(found),
        )
    return table


def _verdicts(result: Json) -> Iterable[str]:
    yield from (f"note: {note}" for note in result["notes"])
    yield from (agreement(name, seen) for name, seen in (result["server_metrics"] or {}).items())
    if result["slo"] is not None:
        slo = result["slo"]
        limits = ", ".join(f"{name} ≤ {limit:g}" for name, limit in slo["limits"].items())
        verdict = "met" if slo["met"] else "missed"
        sure = "" if slo["is_sure"] else " (too few requests to be sure)"
        yield f"SLO {limits} for {slo['target_ratio']:.1%} of requests: {verdict}{sure}"
    if result["status"] != "complete":
        yield f"the run was {result['status']}: this is what was measured until then"


def agreement(name: str, seen: Json) -> str:
    """One line of what the server says about itself."""
    found = []
    for percentile in ("p50", "p90", "p99"):
        low, high = seen[percentile]["server_bucket"]
        bucket = f"{milliseconds(low)}–{milliseconds(high)}" if high is not None else f"above {milliseconds(low)}"
        agrees = {True: "agrees", False: "differs", None: "not ours to see"}[seen[percentile]["agrees"]]
        found.append(f"{percentile} {bucket} ({agrees})")
    return f"the server's own {METRICS[name]}, in ms: mean {milliseconds(seen['server_mean'])}, {', '.join(found)}"


def percent(ratio: float | None) -> str:
    """One digit after the point; – where there is none."""
    return "–" if ratio is None else f"{ratio:.1%}"


def _mean(tokens: Json) -> str:
    return "–" if tokens["mean"] is None else f"{tokens['mean']:.1f}"


def _short(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def print_comparison(comparison: Json, console: Console) -> None:
    """Every difference with its interval, and which are real."""
    table = Table("", "metric", "", "A", "B", "B against A", "interval", "verdict on B")
    for row in comparison["rows"]:
        interval = row["interval"]
        table.add_row(
            row["group"],
            row["metric"],
            row["statistic"],
            f"{row['a']:.4g}",
            f"{row['b']:.4g}",
            f"{row['change_ratio']:+.1%}",
            "–" if interval is None else f"{interval[0]:+.1%} … {interval[1]:+.1%}",
            Text(row["verdict"], style=VERDICT_STYLES.get(row["verdict"], "dim")),
        )
    console.print(table)
    for name, (first, second) in comparison["settings_that_differ"].items():
        console.print(Text(f"differs: {name} is {first!r} in A and {second!r} in B"))
    if not comparison["same_machine"]:
        console.print(Text("differs: the machine that measured"))
    a, b = comparison["runs"]
    several = "over all runs of each side" if a > 1 and b > 1 else "within these runs; --more-a and --more-b add others"
    console.print(
        Text(f"{a} against {b} runs. Intervals hold for all {len(comparison['rows'])} comparisons together, {several}.")
    )
