"""Ray's words for what went wrong, in ours."""

from __future__ import annotations

import warnings
from collections.abc import AsyncGenerator
from typing import Any

import pytest
from ray.exceptions import RayActorError, RayTaskError

from serve.errors import GenerationFailed, HalftoneError, Overloaded
from serve.generation import GenerationRequest, SamplingParams
from serve.hop import ReplicaDied

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # Ray Serve's own models
    from serve.remote import RemoteVariant


class Handle:
    """A deployment handle whose every stream breaks with `error`."""

    def __init__(self, error: BaseException) -> None:
        self._error = error
        self.generate = self

    def options(self, *, stream: bool) -> Handle:
        return self

    async def remote(self, *_: Any) -> AsyncGenerator[Any, None]:
        raise self._error
        yield


async def stream_that_breaks_with(error: BaseException) -> None:
    async for _ in RemoteVariant("int8", Handle(error)).generate(
        GenerationRequest("r", "Once", SamplingParams()), "channel"
    ):
        pass


@pytest.mark.parametrize(
    ("error", "ours"),
    [
        (RayActorError(), ReplicaDied),
        (ValueError("a bug of the replica's"), GenerationFailed),
        (Overloaded("full"), Overloaded),
    ],
)
async def test_whatever_breaks_a_stream_comes_out_as_an_error_of_ours(
    error: Exception, ours: type[HalftoneError]
) -> None:
    with pytest.raises(ours):
        await stream_that_breaks_with(error)


async def test_an_error_that_ray_brings_back_is_ours_alone_again() -> None:
    """Ray makes one that is both its own and ours, and whose text is the other side's traceback."""
    both = RayTaskError("generate", "Traceback", Overloaded("full", retry_after_s=3.0)).as_instanceof_cause()
    assert isinstance(both, Overloaded)
    with pytest.raises(Overloaded) as caught:
        await stream_that_breaks_with(both)
    assert type(caught.value) is Overloaded
    assert (str(caught.value), caught.value.retry_after_s) == ("full", 3.0)
