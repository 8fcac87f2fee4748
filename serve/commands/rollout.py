"""`halftone rollout`: move traffic to another precision by evidence. Every command talks to a running server."""

from __future__ import annotations

import getpass
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from serve.commands.admin_client import DEFAULT_URL, AdminClient, AdminKey, Url
from serve.commands.options import AsJson

__all__ = ["app"]

app = typer.Typer(help="Move traffic to another precision by evidence, and back by itself.", no_args_is_help=True)

Id = Annotated[str | None, typer.Argument(help="As r3. Default: the rollout that runs, else the newest.")]
Running = Annotated[str | None, typer.Argument(help="As r3. Default: the rollout that runs.")]
By = Annotated[str | None, typer.Option(help="Who asks, for the journal. Default: your user name.")]


@app.command()
def start(
    to: Annotated[str | None, typer.Option(help="The variant to roll out, as int8.")] = None,
    plan: Annotated[
        Path | None, typer.Option(help="The plan as YAML (docs/ROLLOUTS.md); options below change it.")
    ] = None,
    step: Annotated[
        list[str] | None, typer.Option(help="WEIGHT[:MIN_SAMPLES[:HOLD_S]] of one step (repeatable), as 5:200:60.")
    ] = None,
    shadow: Annotated[
        float | None, typer.Option(min=0, max=1, help="Mirror this share of requests first; 0 mirrors none.")
    ] = None,
    guard: Annotated[
        list[str] | None, typer.Option(help="NAME=MARGIN, or NAME=off (repeatable), as ttft=0.15.")
    ] = None,
    cap: Annotated[list[str] | None, typer.Option(help="Quality guard's NAME=LIMIT, as kl_divergence=0.06.")] = None,
    alpha: Annotated[float | None, typer.Option(help="Chance of a false rollback.")] = None,
    power: Annotated[float | None, typer.Option(help="Chance of a right decision, for the estimate.")] = None,
    on_inconclusive: Annotated[str | None, typer.Option(help="hold or rollback.")] = None,
    time_limit: Annotated[float | None, typer.Option(help="Seconds for the whole rollout.")] = None,
    approval: Annotated[bool, typer.Option("--approval", help="A person approves the promotion.")] = False,
    free_stable: Annotated[
        bool, typer.Option("--free-stable", help="Give the old variant's memory back after the promotion.")
    ] = False,
    expected: Annotated[
        Path | None, typer.Option(help="What `halftone evaluate --json` printed: the quality that is expected.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the plan and what it needs; start nothing.")
    ] = False,
    by: By = None,
    url: Url = DEFAULT_URL,
    admin_key: AdminKey = None,
    as_json: AsJson = False,
) -> None:
    """Start a rollout to a variant; one that runs is ended for it.

    JSON: DETAIL of docs/ROLLOUTS.md, with --dry-run PREVIEW.
    """
    from serve.commands import rollout_table
    from serve.commands.rollout_plan import read_expected, read_plan

    flags = {
        "to": to,
        "alpha": alpha,
        "power": power,
        "on_inconclusive": on_inconclusive,
        "time_limit_s": time_limit,
        "free_stable": free_stable or None,
    }
    body = read_plan(plan, flags, step or [], guard or [], cap or [], shadow=shadow, approval=approval)
    with AdminClient(url, admin_key) as admin:
        if expected is not None:
            precisions = {row["name"]: row.get("precision") for row in admin.get("/variants")["variants"]}
            body["expected"] = read_expected(expected, body["to"], precisions.get(body["to"]))
        told = admin.post("/rollouts", {**body, "by": _who(by), "dry_run": dry_run})
    _print(told, as_json, rollout_table.preview if dry_run else rollout_table.detail)


@app.command()
def status(id: Id = None, url: Url = DEFAULT_URL, admin_key: AdminKey = None, as_json: AsJson = False) -> None:
    """Where a rollout stands, guard by guard.

    JSON: DETAIL of docs/ROLLOUTS.md.
    """
    from serve.commands import rollout_table

    with AdminClient(url, admin_key) as admin:
        _print(admin.get(f"/rollouts/{_named(admin, id)}"), as_json, rollout_table.detail)


@app.command()
def pause(
    id: Running = None, by: By = None, url: Url = DEFAULT_URL, admin_key: AdminKey = None, as_json: AsJson = False
) -> None:
    """Hold a rollout where it is; its guards are still watched."""
    _order("pause", id, by, url, admin_key, as_json)


@app.command()
def resume(
    id: Running = None, by: By = None, url: Url = DEFAULT_URL, admin_key: AdminKey = None, as_json: AsJson = False
) -> None:
    """Go on with a rollout that holds."""
    _order("resume", id, by, url, admin_key, as_json)


@app.command()
def approve(
    id: Running = None, by: By = None, url: Url = DEFAULT_URL, admin_key: AdminKey = None, as_json: AsJson = False
) -> None:
    """Open the gate that a rollout waits at. What its guards have to prove is never skipped."""
    _order("approve", id, by, url, admin_key, as_json)


@app.command()
def promote(
    id: Running = None, by: By = None, url: Url = DEFAULT_URL, admin_key: AdminKey = None, as_json: AsJson = False
) -> None:
    """The same as approve."""
    _order("promote", id, by, url, admin_key, as_json)


@app.command()
def abort(
    id: Running = None, by: By = None, url: Url = DEFAULT_URL, admin_key: AdminKey = None, as_json: AsJson = False
) -> None:
    """End a rollout; the stable variant takes the canary's traffic back."""
    _order("abort", id, by, url, admin_key, as_json)


@app.command()
def history(
    id: Annotated[str | None, typer.Argument(help="As r3. Default: a table of all rollouts.")] = None,
    url: Url = DEFAULT_URL,
    admin_key: AdminKey = None,
    as_json: AsJson = False,
) -> None:
    """What happened in one rollout line by line, or all rollouts that there were.

    JSON: {"id", "lines": [LINE]}, or {"active", "rollouts": [ROLLOUT]}.
    """
    from serve.commands import rollout_table

    with AdminClient(url, admin_key) as admin:
        if id is None:
            _print(admin.get("/rollouts"), as_json, rollout_table.overview)
        else:
            _print(admin.get(f"/rollouts/{id}/history"), as_json, rollout_table.history)


@app.command()
def explain(id: Id = None, url: Url = DEFAULT_URL, admin_key: AdminKey = None, as_json: AsJson = False) -> None:
    """Why a rollout ended as it did, or stands where it stands, with the numbers.

    JSON: DETAIL of docs/ROLLOUTS.md.
    """
    from serve.commands import rollout_table

    with AdminClient(url, admin_key) as admin:
        _print(admin.get(f"/rollouts/{_named(admin, id)}"), as_json, rollout_table.explanation)


@app.command()
def certify(
    id: Annotated[str, typer.Argument(help="A rollout, or traffic: what was recorded while none ran.")] = "traffic",
    to: Annotated[str, typer.Option(help="With traffic: the precision whose default plan is tried.")] = "int8",
    replays: Annotated[int, typer.Option(min=1, help="Replays of each effect.")] = 100,
    seed: int = 0,
    url: Url = DEFAULT_URL,
    admin_key: AdminKey = None,
    as_json: AsJson = False,
) -> None:
    """Replay recorded traffic as A/A and with planted effects: false rollbacks, power and the sample that it takes.

    The replays run here, not on the server.

    JSON: {"outcomes", "users", "alpha", "false_rollback", "power": {effect: share}, "rows": [...], "sentence"}.
    """
    from serve.commands import rollout_table
    from serve.commands.terminal import Steps, standard_error
    from serve.errors import SetupError
    from serve.rollout import Outcome, Plan, plan_for
    from serve.rollout.certify import certify as replay

    with AdminClient(url, admin_key) as admin:
        told = admin.get(f"/rollouts/{id}/recorded")
    outcomes = [Outcome.from_dict(outcome) for outcome in told["outcomes"]]
    if not any(outcome.variant == told["stable"] for outcome in outcomes):
        raise SetupError(f"nothing is recorded of {told['stable']} under {id!r}: let it serve for a while first")
    plan = Plan.from_dict(told["plan"]) if told["plan"] else plan_for(told["stable"], "canary", to)
    with Steps(1, standard_error())("replaying") as tell:
        certificate = replay(
            plan, outcomes, replays=replays, seed=seed, looks_every=200,
            progress=lambda done, total: tell("replays", done, total),
        )  # fmt: skip
    _print(certificate.to_dict(), as_json, rollout_table.certificate)


def _order(order: str, id: str | None, by: str | None, url: str, admin_key: str | None, as_json: bool) -> None:
    from serve.commands import rollout_table
    from serve.errors import SetupError

    with AdminClient(url, admin_key) as admin:
        if (id := id or admin.get("/rollouts")["active"]) is None:
            raise SetupError("no rollout runs; `halftone rollout history` lists those that did")
        told = admin.post(f"/rollouts/{id}/{order}", {"by": _who(by)})
    _print(told, as_json, rollout_table.detail)


def _named(admin: AdminClient, id: str | None) -> str:
    from serve.errors import SetupError

    if id is not None:
        return id
    known = admin.get("/rollouts")
    if not known["rollouts"]:
        raise SetupError("there was no rollout yet: `halftone rollout start --to VARIANT` begins one")
    return str(known["active"] or known["rollouts"][0]["id"])


def _who(by: str | None) -> str:
    try:
        return by or getpass.getuser()
    except (OSError, KeyError):  # a container's user has no name
        return "operator"


def _print(told: Mapping[str, Any], as_json: bool, show: Any) -> None:
    from serve.commands.terminal import print_json, standard_output

    if as_json:
        print_json(told)
    else:
        show(told, standard_output())
