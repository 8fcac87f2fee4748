"""`halftone experiment`: several variants side by side on live traffic. Every command talks to a running server."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any

import typer

from serve.commands.admin_client import DEFAULT_URL, AdminClient, AdminKey, Url
from serve.commands.options import AsJson
from serve.errors import SetupError

__all__ = ["app"]

app = typer.Typer(help="Compare variants side by side on live traffic.", no_args_is_help=True)

Name = Annotated[str, typer.Argument(help="The experiment's name.")]
_UNITS_S = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


@app.command()
def start(
    name: Name,
    weight: Annotated[list[str], typer.Option(help="VARIANT=PERCENT (repeatable); they sum to 100.")],
    baseline: Annotated[str | None, typer.Option(help="Whom to compare with. Default: the stable variant.")] = None,
    salt: Annotated[str | None, typer.Option(help="Deals users anew. Default: the name.")] = None,
    holdout: Annotated[float | None, typer.Option(help="Percent of users who stay on stable, left out.")] = None,
    duration: Annotated[str | None, typer.Option(help="As 90s, 30m, 2h or 7d. Default: until it is stopped.")] = None,
    price: Annotated[float | None, typer.Option(help="Per hour of one replica's machine.")] = None,
    settle: Annotated[float | None, typer.Option(help="Seconds before latency counts. Default: 30.")] = None,
    block: Annotated[
        float | None, typer.Option(help="Seconds of the blocks that intervals vary over. Default: 30.")
    ] = None,
    url: Url = DEFAULT_URL,
    admin_key: AdminKey = None,
    as_json: AsJson = False,
) -> None:
    """Deal users by these weights and count what each variant gives. JSON: EXPERIMENT of docs/EXPERIMENTS.md."""
    asked = {
        "name": name,
        "weights": dict(map(_weight, weight)),
        "baseline": baseline,
        "salt": salt,
        "holdout": holdout,
        "duration_s": None if duration is None else _seconds(duration),
        "price_per_hour": price,
        "settle_s": settle,
        "block_s": block,
    }
    with AdminClient(url, admin_key) as admin:
        told = admin.post("/experiments", {key: value for key, value in asked.items() if value is not None})
    _print({"active": name, "experiments": [told]} if not as_json else told, as_json, _list)


@app.command()
def report(name: Name, url: Url = DEFAULT_URL, admin_key: AdminKey = None, as_json: AsJson = False) -> None:
    """What each variant gave so far. JSON: REPORT of docs/EXPERIMENTS.md."""
    with AdminClient(url, admin_key) as admin:
        _print(admin.get(f"/experiments/{name}/report"), as_json, _report)


@app.command()
def stop(name: Name, url: Url = DEFAULT_URL, admin_key: AdminKey = None, as_json: AsJson = False) -> None:
    """End it: traffic is again what it was before. JSON: EXPERIMENT of docs/EXPERIMENTS.md."""
    with AdminClient(url, admin_key) as admin:
        told = admin.post(f"/experiments/{name}/stop", {})
    _print({"active": None, "experiments": [told]} if not as_json else told, as_json, _list)


@app.command("list")
def list_experiments(url: Url = DEFAULT_URL, admin_key: AdminKey = None, as_json: AsJson = False) -> None:
    """All experiments, the newest first."""
    with AdminClient(url, admin_key) as admin:
        _print(admin.get("/experiments"), as_json, _list)


def _weight(text: str) -> tuple[str, float]:
    name, _, percent = text.partition("=")
    try:
        return name, float(percent)
    except ValueError:
        raise SetupError(f"--weight must be VARIANT=PERCENT, as int8=50, got {text!r}") from None


def _seconds(text: str) -> float:
    if not (found := re.fullmatch(r"(\d+(?:\.\d+)?)([smhd]?)", text)):
        raise SetupError(f"--duration must be a number with s, m, h or d, as 2h, got {text!r}")
    return float(found[1]) * _UNITS_S[found[2] or "s"]


def _print(told: Mapping[str, Any], as_json: bool, show: Any) -> None:
    from serve.commands.terminal import print_json, standard_output

    if as_json:
        print_json(told)
    else:
        show(told, standard_output())


def _list(told: Mapping[str, Any], console: Any) -> None:
    from rich.table import Table

    table = Table("experiment", "state", "weights", "holdout", "stopped by")
    for row in told["experiments"]:
        weights = ", ".join(f"{name} {weight:g}" for name, weight in row["weights"].items() if weight)
        table.add_row(row["name"], row["state"], weights, f"{row['holdout']:g} %", row["stopped_by"] or "")
    console.print(table)


def _report(told: Mapping[str, Any], console: Any) -> None:
    from rich.table import Table

    titles = ("variant", "n", "users", "TTFT p50 ms", "ITL p50 ms", "E2E p50 s", "tokens/s", "errors", "KL")
    table = Table(*titles, "cost per million tokens")
    for row in told["variants"]:
        drift = row["drift"]["kl_divergence_nats"] if row["drift"] else {"estimate": None}
        table.add_row(
            row["variant"],
            str(row["n"]),
            str(row["units"]),
            _shown(row["ttft_s"]["p50"], 1e3),
            _shown(row["itl_s"]["p50"], 1e3),
            _shown(row["e2e_s"]["p50"], 1.0),
            _shown({"estimate": row["tokens_per_s"]}, 1.0),
            _shown(row["error_rate"], 1.0),
            _shown(drift, 1.0),
            _shown({"estimate": row["cost_per_million_tokens"]}, 1.0),
        )
    console.print(table)
    console.print(told["split"]["sentence"])
    for row in told["comparisons"]:
        console.print(row["sentence"])


def _shown(interval: Mapping[str, Any], factor: float) -> str:
    if interval["estimate"] is None:
        return "-"
    text = f"{interval['estimate'] * factor:.3g}"
    if interval.get("low") is None:
        return text
    high = "?" if interval["high"] is None else f"{interval['high'] * factor:.3g}"
    return f"{text} ({interval['low'] * factor:.3g} to {high})"
