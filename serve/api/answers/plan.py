"""What one answer must look like: the same facts for the whole body and for the stream."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final
from uuid import uuid4

from serve.api.backend import Call
from serve.api.schema.sampling import CallKind
from serve.generation import Delta, Disclosure, GenerationRequest, PromptDelta

__all__ = ["Plan", "Usage", "new_call_id"]

_OBJECTS: Final[Mapping[str, str]] = {"cmpl": "text_completion", "chatcmpl": "chat.completion"}


def new_call_id(kind: CallKind) -> str:
    return f"{kind}-{uuid4().hex}"


@dataclass(frozen=True, slots=True)
class Plan:
    """echo_texts: by request id, what `echo` puts before the answer; a prompt that is absent is echoed as the replica
    spells it. prompt_logprobs: whether vLLM's field of that name was asked for. include_usage and continuous_usage
    concern the stream alone.
    """

    call_id: str
    kind: CallKind
    call: Call
    echo: bool = False
    echo_texts: Mapping[str, str] = field(default_factory=dict)
    return_token_ids: bool = False
    prompt_logprobs: bool = False
    include_usage: bool = False
    continuous_usage: bool = False
    created: int = field(default_factory=lambda: int(time.time()))

    def with_echo_texts(self, texts: Mapping[str, str]) -> Plan:
        return replace(self, echo_texts=texts)

    def head(self, disclosure: Disclosure, *, chunk: bool = False) -> dict[str, Any]:
        """The fields that open every body and every chunk."""
        return {
            "id": self.call_id,
            "object": _OBJECTS[self.kind] + (".chunk" if chunk and self.kind == "chatcmpl" else ""),
            "created": self.created,
            "model": self.call.model,
            "system_fingerprint": disclosure.fingerprint,
        }

    def numbered(self) -> dict[tuple[str, int], int]:
        """(request id, choice of the request) → index of the choice in the answer."""
        keys = [(request.request_id, choice) for request in self.call.requests for choice in range(request.n)]
        return {key: index for index, key in enumerate(keys)}

    def request(self, request_id: str) -> GenerationRequest:
        return next(request for request in self.call.requests if request.request_id == request_id)

    def echo_text(self, prompt: PromptDelta) -> str:
        return self.echo_texts.get(prompt.request_id, prompt.text) if self.echo else ""


@dataclass(slots=True)
class Usage:
    """Tokens so far; a prompt counts once, however many choices continue it."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0

    def add(self, event: PromptDelta | Delta) -> None:
        if isinstance(event, Delta):
            self.completion_tokens += len(event.token_ids)
        else:
            self.prompt_tokens += len(event.prompt_token_ids)
            self.cached_tokens += event.cached_tokens

    def to_dict(self) -> dict[str, Any]:
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }
