"""The seam between the HTTP rim and what stands behind it. Standard library and `serve.generation` only.

The rim knows OpenAI's shapes and nothing of routing; a `Backend` knows who serves what and nothing of HTTP. The router
implements it; the rim's tests implement it with scripted deltas. Everything behind raises `HalftoneError`s alone.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from serve.generation import Disclosure, Event, GenerationRequest, Prompt, Tokenized

__all__ = ["Answer", "Backend", "Call", "Experiments", "ModelCard", "ModelState", "Rollouts"]

ModelState = Literal["loading", "ready", "failed", "freed"]


@dataclass(frozen=True, slots=True)
class Call:
    """One HTTP call. All its prompts go to one variant, so that one disclosure is true for the whole answer.

    model: "NAME" is routed, "NAME@VARIANT" pins; anything else is the backend's to refuse (`UnknownModel`).
    pin: the variant that the header `x-halftone-variant` asks for; contradicting `model` is an `InvalidRequest`.
    sticky_key: what keeps a user on one variant (the rim reads it from where the settings say).
    stream: whether the client reads while it is written; a hint, the events are the same.
    """

    model: str
    requests: tuple[GenerationRequest, ...]
    pin: str | None = None
    sticky_key: str | None = None
    stream: bool = False


class Answer(Protocol):
    """One call under way on one variant."""

    @property
    def disclosure(self) -> Disclosure: ...

    def events(self) -> AsyncIterator[Event]:
        """The events of all requests of the call, interleaved; ends when all are done. Iterated once.

        The rim awaits the first event before it sends a header. So what refuses the call (a prompt that is too long, a
        full queue, a dead replica) comes first, as a `Failure` or raised here, and becomes a proper status that still
        says who was asked. Later a `Failure` ends its request, and a raised `HalftoneError` the whole answer.
        """
        ...

    async def cancel(self) -> None:
        """The client went away: stop all of it and free its blocks within one step. Idempotent, never raises."""
        ...


@dataclass(frozen=True, slots=True)
class ModelCard:
    """One name that a client may ask for: NAME itself (`variant` is None), and each NAME@VARIANT.

    context_length: tokens; None while it is not known (still loading). reason: why the state is "failed".
    """

    id: str
    state: ModelState
    variant: str | None = None
    precision: str | None = None
    context_length: int | None = None
    fingerprint: str | None = None
    reason: str | None = None


class Backend(Protocol):
    """All that the rim asks of the server behind it."""

    def models(self) -> Sequence[ModelCard]:
        """From memory: the rim may ask on every call."""
        ...

    def ready(self) -> bool:
        """Every variant has loaded or failed, and NAME can be answered."""
        ...

    async def start(self, call: Call) -> Answer:
        """Route the call and begin. Raises only what is known before a variant is chosen: `UnknownModel`,
        `InvalidRequest`, `VariantUnavailable`. Once one is chosen, errors come through `Answer.events`.
        Cancelled (the client went away meanwhile), it leaves nothing running behind."""
        ...

    def refused(self, status: int) -> None:
        """A generation call was answered with this 4xx before it reached `start`: for `request_errors_total`."""
        ...

    async def tokenize(self, model: str, prompt: Prompt, add_special_tokens: bool) -> Tokenized: ...

    async def detokenize(self, model: str, ids: tuple[int, ...]) -> str: ...

    async def metrics(self) -> str:
        """Everything that this server counts, as Prometheus text (version 0.0.4)."""
        ...

    async def variants(self) -> Sequence[Mapping[str, Any]]:
        """One JSON-ready mapping per variant: name, precision, state, reason, its load report, its memory in bytes."""
        ...

    async def traffic(self) -> Mapping[str, Any]:
        """The split in force, JSON-ready (`Split.to_dict`)."""
        ...

    async def set_traffic(
        self, weights: Mapping[str, float], shadow: Mapping[str, float] | None = None
    ) -> Mapping[str, Any]:
        """Deal traffic anew and return the split that is now in force. Restarts nothing.

        weights: percent by variant name, to sum to 100. shadow: share 0-1 by variant name; None leaves it as it is.
        Raises `ConfigError` with the key's path.
        """
        ...


class Rollouts(Protocol):
    """All that the rim asks about rollouts; answers are JSON-ready, in the shapes of docs/ROLLOUTS.md.

    Raises `NotFound` for an unknown id, `Conflict` for what means nothing now, `ConfigError` for a plan's key.
    """

    async def start(self, body: Mapping[str, Any]) -> Mapping[str, Any]: ...

    async def order(self, id: str, order: str, by: str) -> Mapping[str, Any]: ...

    async def all(self) -> Mapping[str, Any]: ...

    async def show(self, id: str) -> Mapping[str, Any]: ...

    async def history(self, id: str) -> Mapping[str, Any]: ...

    async def recorded(self, id: str) -> Mapping[str, Any]: ...


class Experiments(Protocol):
    """The same about experiments, in the shapes of docs/EXPERIMENTS.md."""

    async def start(self, body: Mapping[str, Any]) -> Mapping[str, Any]: ...

    async def stop(self, name: str) -> Mapping[str, Any]: ...

    async def all(self) -> Mapping[str, Any]: ...

    async def report(self, name: str) -> Mapping[str, Any]: ...
