"""`PUT /admin/traffic`."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from serve.api.schema.body import Body

__all__ = ["TrafficBody"]

Percent = Annotated[float, Field(ge=0, le=100)]
Share = Annotated[float, Field(ge=0, le=1)]


class TrafficBody(Body):
    weights: Annotated[dict[str, Percent], Field(min_length=1, max_length=256, description="Percent; to sum to 100.")]
    shadow: Annotated[dict[str, Share], Field(max_length=256)] | None = Field(
        default=None, description="Share of requests mirrored to a variant; absent leaves it as it is."
    )
