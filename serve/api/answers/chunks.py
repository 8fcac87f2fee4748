"""A streamed answer as server-sent events: one per event of the engine, OpenAI's chunks inside.

This runs once per token of every stream, so what is the same in each chunk is serialised once, and the rest is glued
in as JSON text; `whole.py` is the plain counterpart, and a test compares what the two say.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any, Final

from serve.api.answers.logprobs import LegacyLogprobs, chat_logprobs
from serve.api.answers.plan import Plan, Usage
from serve.errors import GenerationFailed
from serve.generation import Delta, Disclosure, PromptDelta

__all__ = ["ChatChunks", "Chunks", "CompletionChunks", "chunks"]

_dumps = json.JSONEncoder(separators=(",", ":")).encode

_DONE: Final = "data: [DONE]\n\n"


class Chunks:
    """Writes one answer's events as text. Subclasses know what a choice looks like inside `"choices":[...]`."""

    def __init__(self, plan: Plan, disclosure: Disclosure) -> None:
        self._plan = plan
        self._usage = Usage()
        self._numbered = plan.numbered()
        self._prompts: dict[str, PromptDelta] = {}
        self._open = set(self._numbered.values())
        self._head = "data: " + _dumps(plan.head(disclosure, chunk=True))[:-1] + ',"choices":['
        self._tail = '],"usage":null}\n\n' if plan.include_usage else "]}\n\n"
        self._logprobs = plan.call.requests[0].params.logprobs

    def write(self, events: Iterable[PromptDelta | Delta]) -> str:
        return "".join([self._event(event) for event in events])

    def end(self) -> str:
        """The usage if it was asked for, and `[DONE]`. Raises `GenerationFailed` if a choice has no end."""
        if self._open:
            raise GenerationFailed("the answer ended before all of its choices did")
        if not self._plan.include_usage:
            return _DONE
        return f'{self._head}],"usage":{_dumps(self._usage.to_dict())}}}\n\n{_DONE}'

    def _event(self, event: PromptDelta | Delta) -> str:
        self._usage.add(event)
        if isinstance(event, Delta):
            index = self._numbered[event.request_id, event.choice_index]
            text = self._delta(index, event)
            if event.finish_reason is not None:
                self._open.discard(index)
            return text
        self._prompts[event.request_id] = event
        mine = [index for (request_id, _), index in self._numbered.items() if request_id == event.request_id]
        return "".join([self._prompt(index, event) for index in mine])

    def _prompt(self, index: int, prompt: PromptDelta) -> str:
        """What a choice says before its first token; most say nothing."""
        return ""

    def _delta(self, index: int, delta: Delta) -> str:
        raise NotImplementedError

    def _chunk(self, choice: str) -> str:
        if self._plan.continuous_usage:
            return f'{self._head}{choice}],"usage":{_dumps(self._usage.to_dict())}}}\n\n'
        return f"{self._head}{choice}{self._tail}"

    def _ending(self, delta: Delta) -> str:
        """The fields after text and logprobs: null until the last chunk of a choice."""
        ids = f',"token_ids":{_dumps(delta.token_ids)}' if self._plan.return_token_ids else ""
        if delta.finish_reason is None:
            return ids + ',"finish_reason":null}'
        return f'{ids},"finish_reason":"{delta.finish_reason}","stop_reason":{_dumps(delta.stop_reason)}}}'

    def _prompt_ids(self, prompt: PromptDelta) -> str:
        return f',"prompt_token_ids":{_dumps(prompt.prompt_token_ids)}' if self._plan.return_token_ids else ""


class CompletionChunks(Chunks):
    def __init__(self, plan: Plan, disclosure: Disclosure) -> None:
        super().__init__(plan, disclosure)
        self._legacy: dict[int, LegacyLogprobs] = {}
        if self._logprobs is not None:
            self._legacy = {index: LegacyLogprobs(self._logprobs) for index in self._open}

    def _prompt(self, index: int, prompt: PromptDelta) -> str:
        if not self._plan.echo and not self._plan.return_token_ids:
            return ""
        text = self._plan.echo_text(prompt)
        logprobs = self._legacy[index].prompt(prompt, text) if self._legacy and self._plan.echo else None
        ids = self._prompt_ids(prompt) + (',"token_ids":[]' if self._plan.return_token_ids else "")
        return self._chunk(f'{_choice(index, text, logprobs)}{ids},"finish_reason":null}}')

    def _delta(self, index: int, delta: Delta) -> str:
        logprobs = self._legacy[index].output(delta.logprobs) if self._legacy else None
        return self._chunk(_choice(index, delta.text, logprobs) + self._ending(delta))


class ChatChunks(Chunks):
    def __init__(self, plan: Plan, disclosure: Disclosure) -> None:
        super().__init__(plan, disclosure)
        self._silent = set(self._open)

    def _delta(self, index: int, delta: Delta) -> str:
        opening = ""
        if index in self._silent:
            self._silent.discard(index)
            opening = self._role(index, delta.request_id)
        content = f'"content":{_dumps(delta.text)}' if delta.text or delta.finish_reason is None else ""
        logprobs = _dumps(chat_logprobs(delta.logprobs)) if self._logprobs is not None else "null"
        choice = f'{{"index":{index},"delta":{{{content}}},"logprobs":{logprobs}'
        return opening + self._chunk(choice + self._ending(delta))

    def _role(self, index: int, request_id: str) -> str:
        """Opens each choice, in one write with its first token, so that nobody takes it for one."""
        ids = self._prompt_ids(self._prompts[request_id])
        role = '"delta":{"role":"assistant","content":""},"logprobs":null'
        return self._chunk(f'{{"index":{index},{role}{ids},"finish_reason":null}}')


def chunks(plan: Plan, disclosure: Disclosure) -> Chunks:
    return (ChatChunks if plan.kind == "chatcmpl" else CompletionChunks)(plan, disclosure)


def _choice(index: int, text: str, logprobs: dict[str, Any] | None) -> str:
    """A completion's choice, left open for its ending."""
    said = "null" if logprobs is None else _dumps(logprobs)
    return f'{{"index":{index},"text":{_dumps(text)},"logprobs":{said}'
