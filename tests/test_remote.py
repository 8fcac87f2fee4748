"""Ray's and gRPC's words for what went wrong, in ours."""

from __future__ import annotations

import warnings
from collections.abc import AsyncGenerator
from typing import Any

import grpc
import pytest
from ray.exceptions import RayTaskError

from serve.errors import GenerationFailed, HalftoneError, Overloaded
from serve.generation import GenerationRequest, SamplingParams
from serve.hop import ReplicaDied

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # Ray Serve's own models
    from serve.remote import RemoteVariant


class Handle:
    """A deployment handle whose every stream breaks with `error`, and that notes how it was asked for."""

    def __init__(self, error: BaseException) -> None:
        self._error = error
        self.asked: list[bool] = []
        self.generate = self

    def options(self, *, stream: bool, _by_reference: bool = True) -> Handle:
        other = Handle(self._error)
        other.asked, other.by_reference = self.asked, _by_reference
        return other

    by_reference = True

    def remote(self, *_: Any) -> AsyncGenerator[Any, None]:
        self.asked.append(self.by_reference)
        return self._broken()

    async def _broken(self) -> AsyncGenerator[Any, None]:
        raise self._error
        yield


def broken(code: grpc.StatusCode) -> grpc.aio.AioRpcError:
    nothing = grpc.aio.Metadata()
    return grpc.aio.AioRpcError(code, nothing, nothing)


@pytest.mark.parametrize(
    ("error", "ours"),
    [
        (broken(grpc.StatusCode.UNAVAILABLE), ReplicaDied),
        (broken(grpc.StatusCode.INTERNAL), ReplicaDied),
        (broken(grpc.StatusCode.RESOURCE_EXHAUSTED), GenerationFailed),
        (ValueError("a bug of the replica's"), GenerationFailed),
        (Overloaded("full"), Overloaded),
    ],
)
async def test_whatever_breaks_a_stream_comes_out_as_an_error_of_ours(
    error: Exception, ours: type[HalftoneError]
) -> None:
    link = RemoteVariant("int8", Handle(error))
    with pytest.raises(ours):
        async for _ in link.generate(GenerationRequest("r", "Once", SamplingParams()), "channel"):
            pass


async def test_an_error_that_ray_brings_back_is_ours_alone_again() -> None:
    """Ray makes one that is both its own and ours, and whose text is the other side's traceback."""
    both = RayTaskError("generate", "Traceback", Overloaded("full", retry_after_s=3.0)).as_instanceof_cause()
    assert isinstance(both, Overloaded)
    with pytest.raises(Overloaded) as caught:
        async for _ in RemoteVariant("int8", Handle(both)).generate(
            GenerationRequest("r", "Once", SamplingParams()), "channel"
        ):
            pass
    assert type(caught.value) is Overloaded
    assert (str(caught.value), caught.value.retry_after_s) == ("full", 3.0)


async def test_a_request_whose_recording_is_kept_goes_by_reference_and_all_others_do_not() -> None:
    handle = Handle(Overloaded("full"))
    link = RemoteVariant("int8", handle)
    for keep in (None, "hidden"):
        with pytest.raises(Overloaded):
            async for _ in link.generate(GenerationRequest("r", "Once", SamplingParams(), keep=keep), "channel"):
                pass
    assert handle.asked == [False, True]
