"""From what an operator sends to a plan: `to`, changes over the default plan, and what quality to expect.

The body of `POST /admin/rollouts` is a plan as in YAML with `to: VARIANT`; beside the plan's own keys it may hold
`expected`, the canary's row of `halftone evaluate --json`, `by`, who asks, and `dry_run`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from serve.errors import ConfigError
from serve.rollout.plan import Expected, Plan, plan_for
from serve.rollout.strict import number

__all__ = ["Proposal", "expected_of"]

_OWN = ("to", "expected", "by", "dry_run")


@dataclass(frozen=True)
class Proposal:
    """changes: the plan's keys that differ from the default. expected: an evaluation's row, or None."""

    to: str
    changes: Mapping[str, Any]
    expected: Mapping[str, Any] | None = None
    by: str = "operator"
    dry_run: bool = False

    @classmethod
    def read(cls, body: Mapping[str, Any]) -> Proposal:
        """Raises ConfigError by the key's path."""
        to, by, dry_run = body.get("to"), body.get("by", "operator"), body.get("dry_run", False)
        if not isinstance(to, str) or not to:
            raise ConfigError("rollout.to", "must name the variant to roll out")
        if not isinstance(by, str) or not by or len(by) > 100:
            raise ConfigError("rollout.by", "must be a name of up to 100 characters")
        if not isinstance(dry_run, bool):
            raise ConfigError("rollout.dry_run", f"must be true or false, got {dry_run!r}")
        expected = body.get("expected")
        if expected is not None and not isinstance(expected, Mapping):
            raise ConfigError("rollout.expected", "must be a row of `halftone evaluate --json`")
        changes = {key: value for key, value in body.items() if key not in _OWN}
        for key in ("stable", "canary"):
            if key in changes:
                raise ConfigError(f"rollout.{key}", "is not chosen here: the stable variant is that of the traffic")
        return cls(to, changes, expected, by, dry_run)

    def plan(self, stable: str, precision: str, measured: Mapping[str, Any] | None = None) -> tuple[Plan, str]:
        """The plan from `stable`, and where its expected quality came from, as a sentence.

        `measured`: what the canary's load report says that `halftone evaluate` found on these very weights.
        """
        if self.expected is not None or measured:
            expected = expected_of(self.expected or measured or {})
            source = "the evaluation that came with the plan"
            if self.expected is None:
                source = "`halftone evaluate` of these very weights, which their artifact remembers"
            silent = [name for name in ("kl_divergence", "top1_agreement") if getattr(expected, name) is None]
            if silent:
                source += f" (for {' and '.join(silent)}: what is typical of {precision})"
        else:
            expected = None
            source = (
                f"what is typical of {precision} on a small model: `halftone evaluate ... --json` measures your own, "
                "and --expected takes it"
            )
        return plan_for(stable, self.to, precision, expected, self.changes), source


def expected_of(row: Mapping[str, Any]) -> Expected:
    """The quality in a row of `evaluate --json`; a distribution counts by its mean. Unknown keys are not looked at."""
    values: dict[str, float] = {}
    for name in (field.name for field in fields(Expected)):
        value = row.get(name)
        if isinstance(value, Mapping):
            value = value.get("mean")
        if value is not None:
            values[name] = number(f"rollout.expected.{name}", value, 0, 1e9)
    return Expected(**values)
