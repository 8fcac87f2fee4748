"""Variants and the controller through Ray Serve's handles, and the one place where Ray's exceptions become ours."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from ray.exceptions import ObjectLostError, RayActorError, RayTaskError, TaskCancelledError
from ray.serve.exceptions import (
    BackPressureError,
    DeploymentUnavailableError,
    ReplicaUnavailableError,
)

from serve.errors import GenerationFailed, HalftoneError, Overloaded, VariantUnavailable
from serve.generation import GenerationRequest, Prompt, Tokenized
from serve.heartbeat import IngressBeat, Orders, ReplicaBeat, View
from serve.hop import ReplicaDied
from serve.pairs import Kept, Scores, Side
from serve.wire import Channel

__all__ = ["Handle", "RemoteController", "RemoteExperiments", "RemoteRollouts", "RemoteVariant", "as_halftone"]

_LOG = logging.getLogger(__name__)
_CONTROLLER_TIMEOUT_S = 5.0
_CALL_TIMEOUT_S = 30.0
_SCORING_TIMEOUT_S = 40.0
"""Longer than a replica lets a text wait for its scoring: a reader that has not answered by then is not there."""
Handle = Any
"""A `ray.serve.handle.DeploymentHandle`: its methods are the deployment's, by name, which no type can say."""


class RemoteVariant:
    """One variant's deployment (`serve.router.Link`)."""

    def __init__(self, name: str, handle: Handle) -> None:
        self._name = name
        self._handle = handle

    async def generate(self, request: GenerationRequest, channel: Channel) -> Kept | None:
        with _mapped(f"variant {self._name!r}"):
            response = self._handle.generate.remote(request, channel)
            try:
                kept: Kept | None = await response
            except asyncio.CancelledError:
                response.cancel()  # it may still wait for a replica to be sent to
                raise
            return kept

    async def score(self, kept: Kept, side: Side) -> Scores:
        with _mapped(f"variant {self._name!r}"):
            response = self._handle.score.remote(kept, side)
            try:
                async with asyncio.timeout(_SCORING_TIMEOUT_S):
                    answer: Scores = await response
            except TimeoutError:
                response.cancel()
                raise
            return answer

    async def abort(self, request_ids: Sequence[str]) -> None:
        with _mapped(f"variant {self._name!r}"):
            await self._handle.broadcast("abort", list(request_ids)).results_async(timeout_s=_CALL_TIMEOUT_S)

    async def tokenize(self, prompt: Prompt, add_special_tokens: bool) -> Tokenized:
        answer: Tokenized = await self._call(self._handle.tokenize.remote(prompt, add_special_tokens))
        return answer

    async def detokenize(self, ids: tuple[int, ...]) -> str:
        answer: str = await self._call(self._handle.detokenize.remote(ids))
        return answer

    async def _call(self, response: Awaitable[Any]) -> Any:
        with _mapped(f"variant {self._name!r}"):
            async with asyncio.timeout(_CALL_TIMEOUT_S):
                return await response


class RemoteController:
    """The controller's deployment (`serve.router.Control`, and the `Report` of a replica)."""

    def __init__(self, handle: Handle) -> None:
        self._handle = handle

    async def replica(self, beat: ReplicaBeat) -> Orders:
        answer: Orders = await self._call(self._handle.replica.remote(beat))
        return answer

    async def ingress(self, beat: IngressBeat) -> View:
        answer: View = await self._call(self._handle.ingress.remote(beat))
        return answer

    async def set_traffic(self, weights: Mapping[str, float], shadow: Mapping[str, float] | None = None) -> View:
        answer: View = await self._call(self._handle.set_traffic.remote(dict(weights), shadow))
        return answer

    async def metrics(self, beat: IngressBeat) -> str:
        answer: str = await self._call(self._handle.metrics.remote(beat))
        return answer

    async def variants(self) -> Sequence[Mapping[str, Any]]:
        answer: Sequence[Mapping[str, Any]] = await self._call(self._handle.variants.remote())
        return answer

    async def _call(self, response: Awaitable[Any]) -> Any:
        with _mapped("the controller"):
            async with asyncio.timeout(_CONTROLLER_TIMEOUT_S):
                return await response


class RemoteRollouts:
    """The controller's rollouts (`serve.api.rollouts.Rollouts`)."""

    def __init__(self, handle: Handle) -> None:
        self._handle = handle

    async def start(self, body: Mapping[str, Any]) -> Mapping[str, Any]:
        return await self._call("start", dict(body))

    async def order(self, id: str, order: str, by: str) -> Mapping[str, Any]:
        return await self._call("order", id, order, by)

    async def all(self) -> Mapping[str, Any]:
        return await self._call("all")

    async def show(self, id: str) -> Mapping[str, Any]:
        return await self._call("show", id)

    async def history(self, id: str) -> Mapping[str, Any]:
        return await self._call("history", id)

    async def recorded(self, id: str) -> Mapping[str, Any]:
        return await self._call("recorded", id)

    async def _call(self, method: str, *arguments: Any) -> Mapping[str, Any]:
        with _mapped("the controller"):
            async with asyncio.timeout(_CALL_TIMEOUT_S):
                answer: Mapping[str, Any] = await self._handle.rollouts.remote(method, *arguments)
                return answer


class RemoteExperiments:
    """The controller's experiments (`serve.api.backend.Experiments`)."""

    def __init__(self, handle: Handle) -> None:
        self._handle = handle

    async def start(self, body: Mapping[str, Any]) -> Mapping[str, Any]:
        return await self._call("start", dict(body))

    async def stop(self, name: str) -> Mapping[str, Any]:
        return await self._call("stop", name)

    async def all(self) -> Mapping[str, Any]:
        return await self._call("all")

    async def report(self, name: str) -> Mapping[str, Any]:
        return await self._call("report", name)

    async def _call(self, method: str, *arguments: Any) -> Mapping[str, Any]:
        with _mapped("the controller"):
            async with asyncio.timeout(_CALL_TIMEOUT_S):
                answer: Mapping[str, Any] = await self._handle.experiments.remote(method, *arguments)
                return answer


@contextmanager
def _mapped(who: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        if isinstance(error, HalftoneError) and not isinstance(error, RayTaskError):
            raise
        raise as_halftone(error, who) from error


def as_halftone(error: Exception, who: str) -> HalftoneError:
    """Ray's word for it in ours. An error that we raised on the other side comes back as itself."""
    cause = error.cause if isinstance(error, RayTaskError) else error
    if isinstance(cause, HalftoneError):
        return cause
    if isinstance(cause, ObjectLostError):  # the process that put it into the object store is gone
        return VariantUnavailable(f"what {who} was to read is gone with the replica that kept it", retry_after_s=5.0)
    if isinstance(error, BackPressureError):
        return Overloaded(f"{who} has as many requests as it can queue; try again shortly", retry_after_s=1.0)
    if isinstance(error, RayActorError | ReplicaUnavailableError):
        return ReplicaDied(f"a replica of {who} died while it answered; try again", retry_after_s=1.0)
    if isinstance(error, DeploymentUnavailableError | TimeoutError):
        return VariantUnavailable(f"{who} does not answer; try again shortly", retry_after_s=5.0)
    if not isinstance(error, TaskCancelledError):
        _LOG.error("%s failed", who, exc_info=error)
    return GenerationFailed(f"{who} failed on this request; the server's log says why")
