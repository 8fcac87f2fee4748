"""Rollouts with nothing behind them, in the shapes of docs/ROLLOUTS.md: orders change a phase, and are remembered."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from serve.errors import Conflict

PHASES = {"pause": "holding", "resume": "progressing", "promote": "promoting", "abort": "aborted"}


class StagedRollouts:
    """Implements `serve.api.backend.Rollouts`."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.begun: list[dict[str, Any]] = []
        self.bodies: list[Mapping[str, Any]] = []
        self.orders: list[str] = []

    async def start(self, body: Mapping[str, Any]) -> Mapping[str, Any]:
        self.bodies.append(body)
        if body.get("dry_run"):
            return {"plan": {}, "expected_from": "", "needs": {"sentence": "about 5,690 requests", "needs": []}}
        if any(not rollout["ended"] for rollout in self.begun):
            raise Conflict("a rollout runs already")
        self.begun.insert(0, detail(f"r{len(self.begun) + 1}", body))
        return self.begun[0]

    async def order(self, id: str, order: str, by: str) -> Mapping[str, Any]:
        self.orders.append(order)
        rollout = self._find(id)
        phase = PHASES[order]
        rollout |= {"phase": phase, "paused": phase == "holding", "ended": phase == "aborted"}
        rollout["lines"] = [*rollout["lines"], line(f"{order} by {by}")]
        if rollout["ended"]:
            rollout |= {"weight": 0.0, "sentence": f"{rollout['canary']} was aborted by {by}"}
        return rollout

    async def all(self) -> Mapping[str, Any]:
        active = next((rollout["id"] for rollout in self.begun if not rollout["ended"]), None)
        return {"active": active, "rollouts": self.begun}

    async def show(self, id: str) -> Mapping[str, Any]:
        return self._find(id)

    async def history(self, id: str) -> Mapping[str, Any]:
        return {"id": id, "lines": self._find(id)["lines"]}

    async def recorded(self, id: str) -> Mapping[str, Any]:
        return {"id": id, "stable": "bf16", "plan": None, "outcomes": []}

    def _find(self, id: str) -> dict[str, Any]:
        return next(rollout for rollout in self.begun if rollout["id"] == id)


def detail(id: str, body: Mapping[str, Any]) -> dict[str, Any]:
    steps = [{"weight": float(step["weight"])} for step in body["steps"]]
    finding = {
        "guard": "itl", "result": "pass", "estimate": 0.01, "low": -0.03, "high": 0.05, "tolerance": 0.05,
        "margin": 0.1, "log_e_harm": -0.9, "log_e_safe": 4.2, "n_canary": 400, "n_stable": 7800,
        "sentence": "ITL +1.00 %, between -3.00 % and +5.00 %: within +10.00 %",
    }  # fmt: skip
    verdict = {
        "result": "inconclusive", "sentence": "not yet decided", "guard": None, "log_e_value": 0.3, "e_value": 1.35,
        "n_canary": 420, "n_stable": 7980, "blockers": [], "findings": [finding],
    }  # fmt: skip
    return {
        "id": id, "stable": "bf16", "canary": body["to"], "phase": "progressing", "step": 0, "steps": len(steps),
        "weight": steps[0]["weight"], "shadow_rate": 0.0, "ended": False, "paused": False, "started_at_s": 1.0,
        "lasted_s": 412.0, "decisive": None, "sentence": f"{body['to']} gets {steps[0]['weight']:g} %: not yet decided",
        "plan": {"steps": steps}, "split": {}, "n_step": {"canary": 420, "stable": 7980}, "lines": [line("it began")],
        "needs": {"sentence": ""}, "expected_from": "", "verdict": verdict,
    }  # fmt: skip


def line(sentence: str) -> dict[str, Any]:
    nothing = {"phase": None, "weight": None, "e_value": None, "n_canary": None, "n_stable": None}
    return {"at_s": 1790000000.0, "after_s": 0.0, "kind": "order", "sentence": sentence, **nothing}
