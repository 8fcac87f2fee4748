"""What the terminal shows of rollouts: facts that the server told, as tables and sentences."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

__all__ = ["certificate", "detail", "explanation", "history", "overview", "preview"]

_COLOURS = {"pass": "green", "succeeded": "green", "fail": "red", "rolled_back": "red", "failed": "red"}


def preview(told: Mapping[str, Any], console: Console) -> None:
    """The plan, and how many requests it will need."""
    plan = told["plan"]
    console.print(f"[bold]{escape(plan['stable'])} → {escape(plan['canary'])}[/]")
    console.print(_plan(plan))
    needs = {need["guard"]: need for need in told["needs"]["needs"]}
    table = _table("guard", right=("tolerance", "margin", "expected", "requests to pass", "to see twice the margin"))
    for name, guard in plan["guards"].items():
        need = needs[name]
        expected = f"{guard['expected']:.4g}" if guard["expected"] else "-"
        tolerance = "-" if guard["tolerance"] is None else f"{guard['tolerance']:g}"
        margin = f"{guard['margin']:.4g}" + (f", cap {guard['cap']:g}" if guard["cap"] is not None else "")
        table.add_row(name, tolerance, margin, expected, f"{need['pass_requests']:,}", f"{need['fail_requests']:,}")
    console.print(table)
    for key in ("expected_from", "memory"):
        if told.get(key):
            console.print(f"{key.replace('_', ' ')}: {escape(str(told[key]))}")
    console.print(escape(str(told["needs"]["sentence"])))


def detail(told: Mapping[str, Any], console: Console) -> None:
    """Where one rollout stands, guard by guard."""
    phase = told["phase"]
    at = "mirroring" if told["step"] < 0 and phase == "shadowing" else f"step {told['step'] + 1} of {told['steps']}"
    where = phase.replace("_", " ") if told["ended"] or phase == "pending" else f"{phase.replace('_', ' ')}, {at}"
    console.print(
        f"[bold]{told['id']}[/] {escape(told['stable'])} → {escape(told['canary'])}: {_coloured(phase, where)}, "
        f"{told['weight']:g} % to {escape(told['canary'])}, for {_span(told['lasted_s'])}"
    )
    console.print(escape(told["sentence"]))
    if verdict := told["verdict"]:
        console.print(_findings(verdict))
        for blocker in verdict["blockers"]:
            console.print(f"[yellow]blocked:[/] {escape(blocker)}")


def explanation(told: Mapping[str, Any], console: Console) -> None:
    """The whole story: the sentence, what happened, and every guard's last word."""
    detail(told, console)
    if told["decisive"]:
        console.print(f"decided by [bold]{escape(told['decisive'])}[/]")
    for finding in (told["verdict"] or {}).get("findings", ()):
        console.print(f"  {escape(finding['sentence'])}")
    console.print(f"quality expected: {escape(str(told['expected_from']))}")
    history({"lines": told["lines"]}, console)


def history(told: Mapping[str, Any], console: Console) -> None:
    table = _table("when", "after", "what", "phase", right=("weight", "n canary", "n stable", "e"))
    for line in told["lines"]:
        table.add_row(
            _clock(line["at_s"]),
            _span(line["after_s"]),
            escape(f"{line['kind']}: {line['sentence']}"),
            line["phase"] or "",
            "" if line["weight"] is None else f"{line['weight']:g} %",
            *("" if line[key] is None else f"{line[key]:,}" for key in ("n_canary", "n_stable")),
            "" if line["e_value"] is None else f"{line['e_value']:.3g}",
        )
    console.print(table)


def overview(told: Mapping[str, Any], console: Console) -> None:
    table = _table("id", "from", "to", "phase", "began", "lasted", "why")
    for row in told["rollouts"]:
        table.add_row(
            row["id"], row["stable"], row["canary"], _coloured(row["phase"], row["phase"].replace("_", " ")),
            _clock(row["started_at_s"]), _span(row["lasted_s"]), escape(row["sentence"]),
        )  # fmt: skip
    console.print(table if told["rollouts"] else "no rollout yet")


def certificate(told: Mapping[str, Any], console: Console) -> None:
    table = _table("planted", right=("rolled back", "passed", "median canary requests"))
    for row in told["rows"]:
        median = "-" if row["median_requests"] is None else f"{row['median_requests']:,}"
        table.add_row(row["effect"], f"{100 * row['rolled_back']:.1f} %", f"{100 * row['passed']:.1f} %", median)
    console.print(table)
    console.print(escape(told["sentence"]))


def _findings(verdict: Mapping[str, Any]) -> Table:
    table = _table("guard", "result", right=("estimate", "between", "margin", "e harm", "n canary", "n stable"))
    for finding in verdict["findings"]:
        between = "-" if finding["low"] is None else f"{finding['low']:+.4g} … {finding['high']:+.4g}"
        table.add_row(
            finding["guard"],
            _coloured(finding["result"], finding["result"].replace("_", " ")),
            "-" if finding["estimate"] is None else f"{finding['estimate']:+.4g}",
            between,
            f"{finding['margin']:.4g}",
            f"{2.718281828 ** min(finding['log_e_harm'], 700.0):.3g}",
            f"{finding['n_canary']:,}",
            f"{finding['n_stable']:,}",
        )
    return table


def _plan(plan: Mapping[str, Any]) -> Table:
    table = _table("step", right=("canary", "requests at least", "seconds at least"))
    table.add_column("then")
    if shadow := plan["shadow"]:
        row = (f"{100 * shadow['rate']:g} % mirrored", f"{shadow['min_samples']:g}", f"{shadow['hold_s']:g}")
        table.add_row("shadow", *row, "no harm seen")
    for index, step in enumerate(plan["steps"], start=1):
        proof = index == len(plan["steps"]) or step["evidence"] == "pass"
        then = ("every margin excluded" if proof else "no harm seen") + (", approved" * (step["gate"] == "approval"))
        row = (f"{step['weight']:g} %", f"{step['min_samples']:g}", f"{step['hold_s']:g}")
        table.add_row(str(index), *row, then)
    return table


def _table(*left: str, right: tuple[str, ...] = ()) -> Table:
    table = Table(*left, box=None, header_style="bold", pad_edge=False)
    for title in right:
        table.add_column(title, justify="right")
    return table


def _coloured(word: str, text: str) -> str:
    colour = _COLOURS.get(word)
    return f"[{colour}]{escape(text)}[/]" if colour else escape(text)


def _clock(at_s: float) -> str:
    return datetime.fromtimestamp(at_s).strftime("%Y-%m-%d %H:%M:%S")


def _span(seconds: float) -> str:
    for size, name in ((86400.0, "d"), (3600.0, "h"), (60.0, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {name}"
    return f"{seconds:.0f} s"
