"""What the configuration says about rollouts on this server: where they are remembered, and whom to tell."""

from __future__ import annotations

from dataclasses import dataclass, field

__all__ = ["RolloutSettings", "Webhook"]


@dataclass(frozen=True)
class Webhook:
    """Where transitions are announced. `secret` signs each body; only what the configuration lists is ever called."""

    url: str
    secret: str = field(repr=False)


@dataclass(frozen=True)
class RolloutSettings:
    """store: a database's URL; None is a SQLite file in the user's state folder, one per model name.

    recorded_parcels: how many parcels of outcomes are kept for `certify` while no rollout runs; 0 records nothing.
    """

    store: str | None = None
    webhooks: tuple[Webhook, ...] = ()
    recorded_parcels: int = 2000
