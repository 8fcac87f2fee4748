"""Who gets which variant, and how evidence moves it. Pure: no clock, no network, no Ray, no torch.

`serve.rollout.store` keeps it in a database, and is imported by its own name since only the controller needs it.
"""

from serve.rollout.evidence import Evidence, Rules, StepSeen
from serve.rollout.judge import Finding, Verdict, judge
from serve.rollout.machine import Action, Known, State, canary_weight
from serve.rollout.outcome import Batch, Drift, Outcome
from serve.rollout.plan import Expected, Guard, Hard, Plan, Shadow, Step, kl_guard_nats, plan_for
from serve.rollout.rollout import Entry, Rollout, deal
from serve.rollout.split import Assignment, Route, Split, assign, shadows, unit_hash

__all__ = [
    "Action",
    "Assignment",
    "Batch",
    "Drift",
    "Entry",
    "Evidence",
    "Expected",
    "Finding",
    "Guard",
    "Hard",
    "Known",
    "Outcome",
    "Plan",
    "Rollout",
    "Route",
    "Rules",
    "Shadow",
    "Split",
    "State",
    "Step",
    "StepSeen",
    "Verdict",
    "assign",
    "canary_weight",
    "deal",
    "judge",
    "kl_guard_nats",
    "plan_for",
    "shadows",
    "unit_hash",
]
