from __future__ import annotations

import json
from dataclasses import replace

from serve.rollout import Batch, Outcome, Plan, Rollout, Split, Step, plan_for
from serve.rollout.judge import Verdict
from serve.rollout.store import Store
from serve.rollout.story import explain, history, overview, summary

BASE = Split("bf16", {"bf16": 100.0})
PLAN = Plan(
    "bf16", "int8", (Step(20.0, 10, 5.0), Step(50.0, 10, 5.0)), None, plan_for("bf16", "int8", "int8").guards,
    block_s=1.0, settle_s=0.0,
)  # fmt: skip


def told(error: str | None) -> tuple[Store, str]:
    """A rollout whose canary fails from the second step on, written down as a controller would."""
    store = Store()
    lease = store.acquire("one", 0.0, 1e9)
    assert lease
    rollout, entry = Rollout.begin("r1", PLAN, BASE, 1000.0)
    store.commit(lease, rollout, [entry])
    for second in range(60):
        now_s = 1000.0 + second
        outcomes = tuple(
            Outcome(
                record,
                "int8" if record % 2 else "bf16",
                "sticky",
                rollout.split.revision,
                now_s,
                f"{record:016x}",
                now_s + 0.5,
                error if record % 2 and rollout.state.step == 1 else None,
                completion_tokens=20,
            )
            for record in range(1 + 20 * second, 21 + 20 * second)
        )
        rollout.take(Batch("a", second + 1, now_s, outcomes))
        entries, _ = rollout.tick(now_s)
        if entries:
            store.commit(lease, rollout, entries)
    return store, "r1"


def test_a_rollback_is_explained_with_its_numbers() -> None:
    store, name = told("internal")
    story = explain(store.journal(name))
    assert (story.phase, story.weight, story.canary) == ("rolled_back", 0.0, "int8")
    assert story.decisive in ("error_rate", "unresponsive")
    assert "int8 was rolled back to bf16 after" in story.sentence
    assert "requests of int8" in story.sentence
    assert {chapter.guard for chapter in story.chapters} == set(PLAN.guards)
    json.dumps(story.to_dict())


def test_a_rollout_that_runs_is_told_with_what_has_been_seen_by_now() -> None:
    """The journal has a verdict when it changes, which may be long ago."""
    store, name = told(None)
    rows = store.journal(name)
    verdict = next(row.facts for row in reversed(rows) if row.kind == "verdict")
    live = replace(Verdict.from_dict(verdict), n_canary=4321, n_stable=8765)
    assert "4321 requests of int8 and 8765 of bf16 were seen" in summary(rows, 1e9, live)["sentence"]


def test_history_names_every_move_in_order_with_the_weight_from_then_on() -> None:
    store, name = told("internal")
    lines = history(store.journal(name))
    moves = [(line.phase, line.weight) for line in lines if line.kind == "transition"]
    assert moves[:2] == [("progressing", 20.0), ("progressing", 50.0)]
    assert moves[-2:] == [("rolling_back", 0.0), ("rolled_back", 0.0)]
    assert [line.after_s for line in lines] == sorted(line.after_s for line in lines)
    assert lines[0].kind == "started"


def test_a_rollout_that_waits_says_what_for() -> None:
    store, name = told(None)
    story = explain(store.journal(name))
    assert story.phase == "progressing"
    assert story.decisive is None
    assert "KL divergence: no data" in next(c.sentence for c in story.chapters if c.guard == "kl_divergence")
    assert [one["id"] for one in overview(store.journal(), 0.0)] == ["r1"]
