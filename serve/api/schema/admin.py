"""`PUT /admin/traffic`, and what is posted to `/admin/rollouts`."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from serve.api.schema.body import Body

__all__ = ["ExperimentBody", "OrderBody", "RolloutBody", "TrafficBody"]

Percent = Annotated[float, Field(ge=0, le=100)]
Share = Annotated[float, Field(ge=0, le=1)]


class TrafficBody(Body):
    weights: Annotated[dict[str, Percent], Field(min_length=1, max_length=256, description="Percent; to sum to 100.")]
    shadow: Annotated[dict[str, Share], Field(max_length=256)] | None = Field(
        default=None, description="Share of requests mirrored to a variant; absent leaves it as it is."
    )


class RolloutBody(Body):
    """A plan as in YAML; its own keys (steps, guards, shadow ...) are described in docs/ROLLOUTS.md."""

    to: Annotated[str, Field(min_length=1, max_length=64, description="The variant to roll out.")]
    dry_run: bool = False
    by: Annotated[str, Field(min_length=1, max_length=100, description="Who asks, for the journal.")] = "operator"


class ExperimentBody(Body):
    """What docs/EXPERIMENTS.md lists; all but the first two have defaults."""

    name: Annotated[str, Field(min_length=1, max_length=64)]
    weights: Annotated[dict[str, Percent], Field(min_length=2, max_length=256, description="Percent; to sum to 100.")]


class OrderBody(Body):
    by: Annotated[str, Field(min_length=1, max_length=100, description="Who asks, for the journal.")] = "operator"
