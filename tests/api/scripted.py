"""A backend whose answers are written down: what the rim says then depends on the rim alone.

A prompt is split into words with their leading spaces; a word's token id is its length. The answer to any prompt is
`ANSWER`, cut at `max_tokens`, token by token, with the prompt's first byte nowhere in it.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Any

from serve.api import Call, ModelCard
from serve.errors import ConfigError, HalftoneError, InvalidRequest, UnknownModel
from serve.generation import (
    Delta,
    Disclosure,
    Event,
    Failure,
    FinishReason,
    GenerationRequest,
    Prompt,
    PromptDelta,
    Tokenized,
    TokenLogprob,
)

ANSWER = ["Once", " upon", " a", " time", " é", " 🦊", "."]
CARDS = (
    ModelCard(id="tale", state="ready", context_length=64, fingerprint="f-bf16"),
    ModelCard(id="tale@bf16", state="ready", variant="bf16", precision="bf16", context_length=64, fingerprint="f-bf16"),
    ModelCard(id="tale@nf4", state="failed", variant="nf4", precision="nf4", reason="no file /srv/models/tale/x.bin"),
)

Script = Callable[[GenerationRequest], Sequence[Event | HalftoneError]]


def words(prompt: Prompt) -> list[str]:
    if isinstance(prompt, str):
        return re.findall(r"\s*\S+|\s+$", prompt)
    if isinstance(prompt, tuple):
        return ["x" * token_id for token_id in prompt]
    return words(" ".join(message["content"] for message in prompt.messages))


def token(text: str, alternatives: int = 0) -> TokenLogprob:
    top = tuple(TokenLogprob(100 + i, f"~{i}", -1.0 - i, rank=2 + i) for i in range(alternatives))
    return TokenLogprob(len(text), text, -0.5, tuple(text.encode()), rank=1, top=top)


def story(request: GenerationRequest) -> list[Event | HalftoneError]:
    """`ANSWER` for every choice, one token an event, choices in turn."""
    params = request.params
    pieces = words(request.prompt)
    scored = (
        [None, *(token(piece, params.prompt_logprobs) for piece in pieces[1:])]
        if params.prompt_logprobs is not None
        else []
    )
    opening = PromptDelta(request.request_id, tuple(map(len, pieces)), "".join(pieces) if scored else "", tuple(scored))
    said = ANSWER[: params.max_tokens]
    reason: FinishReason = "stop" if said == ANSWER else "length"
    events: list[Event | HalftoneError] = [opening]
    for position, text in enumerate(said or [""]):
        last = position == max(0, len(said) - 1)
        logprobs = (token(text, params.logprobs),) if text and params.logprobs is not None else ()
        for choice in range(request.n):
            ids = (len(text),) if text else ()
            events.append(Delta(request.request_id, choice, text, ids, logprobs, reason if last else None))
    return events


class ScriptedAnswer:
    def __init__(self, backend: ScriptedBackend, call: Call) -> None:
        self.disclosure = Disclosure("bf16", "bf16", "pinned" if call.pin else "weighted", "f-bf16")
        self._backend = backend
        self._call = call
        self._cancelled = False

    async def events(self) -> AsyncIterator[Event]:
        for request in self._call.requests:
            for event in self._backend.script(request):
                if isinstance(event, HalftoneError):
                    raise event
                if isinstance(event, Delta) and self._backend.pause is not None:
                    await self._backend.pause.wait()
                yield event

    async def cancel(self) -> None:
        if not self._cancelled:
            self._cancelled = True
            self._backend.cancelled.append(self._call)


class ScriptedBackend:
    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.calls: list[Call] = []
        self.cancelled: list[Call] = []
        self.refusals: list[int] = []
        self.script: Script = story
        self.pause: asyncio.Event | None = None
        self.before_start: asyncio.Event | None = None
        self.is_ready = True
        self.split: dict[str, Any] = {"stable": "bf16", "weights": {"bf16": 100.0, "nf4": 0.0}, "shadow": {}}

    def models(self) -> Sequence[ModelCard]:
        return CARDS

    def ready(self) -> bool:
        return self.is_ready

    async def start(self, call: Call) -> ScriptedAnswer:
        self.calls.append(call)
        self._check(call.model)
        if self.before_start is not None:
            try:
                await self.before_start.wait()
            except asyncio.CancelledError:
                self.cancelled.append(call)
                raise
        return ScriptedAnswer(self, call)

    def refused(self, status: int) -> None:
        self.refusals.append(status)

    async def tokenize(self, model: str, prompt: Prompt, add_special_tokens: bool) -> Tokenized:
        self._check(model)
        pieces = (["<s>"] if add_special_tokens else []) + words(prompt)
        return Tokenized(tuple(map(len, pieces)), tuple(pieces), 64)

    async def detokenize(self, model: str, ids: tuple[int, ...]) -> str:
        self._check(model)
        if max(ids, default=0) > 1000:
            raise InvalidRequest("tokens: 1001 is outside of the vocabulary", param="tokens")
        return "".join("x" * token_id for token_id in ids)

    async def metrics(self) -> str:
        return "# TYPE halftone_requests gauge\nhalftone_requests 1\n"

    async def variants(self) -> Sequence[Mapping[str, Any]]:
        return [{"name": "bf16", "state": "ready"}, {"name": "nf4", "state": "failed"}]

    async def traffic(self) -> Mapping[str, Any]:
        return self.split

    async def set_traffic(
        self, weights: Mapping[str, float], shadow: Mapping[str, float] | None = None
    ) -> Mapping[str, Any]:
        if sum(weights.values()) != 100:
            raise ConfigError("traffic.weights", "must sum to 100")
        self.split = {**self.split, "weights": dict(weights)}
        return self.split

    def _check(self, model: str) -> None:
        if model not in {card.id for card in CARDS}:
            raise UnknownModel(f"model {model[:64]!r} is not served; served are: tale, tale@bf16")


def failure(request: GenerationRequest, error: HalftoneError) -> Failure:
    return Failure(request.request_id, error)
