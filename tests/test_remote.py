"""Ray's words for what went wrong, in ours."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
from ray.exceptions import (
    ObjectLostError,
    OwnerDiedError,
    RayActorError,
    RayTaskError,
    ReferenceCountingAssertionError,
)

from serve.errors import GenerationFailed, HalftoneError, Overloaded, VariantUnavailable
from serve.generation import GenerationRequest, SamplingParams
from serve.hop import ReplicaDied
from serve.pairs import Kept
from serve.wire import Channel

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # Ray Serve's own models
    from serve.remote import RemoteVariant


class Handle:
    """A deployment handle whose every call breaks with `error`."""

    def __init__(self, error: BaseException) -> None:
        self._error = error
        self.generate = self.score = self

    async def remote(self, *_: Any) -> None:
        raise self._error


async def call_that_breaks_with(error: BaseException) -> None:
    request = GenerationRequest("r", "Once", SamplingParams())
    await RemoteVariant("int8", Handle(error)).generate(request, Channel("127.0.0.1", 1, b""))


@pytest.mark.parametrize(
    ("error", "ours"),
    [
        (RayActorError(), ReplicaDied),
        (ValueError("a bug of the replica's"), GenerationFailed),
        (Overloaded("full"), Overloaded),
    ],
)
async def test_whatever_breaks_a_call_comes_out_as_an_error_of_ours(
    error: Exception, ours: type[HalftoneError]
) -> None:
    with pytest.raises(ours):
        await call_that_breaks_with(error)


async def test_an_error_that_ray_brings_back_is_ours_alone_again() -> None:
    """Ray makes one that is both its own and ours, and whose text is the other side's traceback."""
    both = RayTaskError("generate", "Traceback", Overloaded("full", retry_after_s=3.0)).as_instanceof_cause()
    assert isinstance(both, Overloaded)
    with pytest.raises(Overloaded) as caught:
        await call_that_breaks_with(both)
    assert type(caught.value) is Overloaded
    assert (str(caught.value), caught.value.retry_after_s) == ("full", 3.0)


@pytest.mark.parametrize("lost", [ObjectLostError, OwnerDiedError, ReferenceCountingAssertionError])
async def test_a_recording_that_died_with_its_replica_is_no_data_and_no_failure(lost: type[ObjectLostError]) -> None:
    """The reader meets it where it fetches the recording, and Ray brings it back as an error of the reader's task."""
    error = lost("00" * 28, b"", "")
    for met in (error, RayTaskError("score", "Traceback", error).as_instanceof_cause()):
        with pytest.raises(VariantUnavailable, match="gone with the replica that kept it"):
            await RemoteVariant("bf16", Handle(met)).score(Kept(None), "variant")
