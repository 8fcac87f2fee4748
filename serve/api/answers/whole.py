"""A whole answer: its events folded by choice, then written once."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from serve.api.answers.logprobs import LegacyLogprobs, chat_logprobs, prompt_logprobs
from serve.api.answers.plan import Plan, Usage
from serve.errors import GenerationFailed
from serve.generation import Delta, Disclosure, PromptDelta, TokenLogprob

__all__ = ["Transcript", "body"]


@dataclass(slots=True)
class Choice:
    prompt: PromptDelta
    texts: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish_reason: str | None = None
    stop_reason: str | int | None = None

    def add(self, delta: Delta) -> None:
        self.texts.append(delta.text)
        self.token_ids += delta.token_ids
        self.logprobs += delta.logprobs
        self.finish_reason = delta.finish_reason
        self.stop_reason = delta.stop_reason


class Transcript:
    """All that has been said so far, by choice, in the order of the answer."""

    def __init__(self, plan: Plan) -> None:
        self.usage = Usage()
        self._numbered = plan.numbered()
        self._choices: dict[int, Choice] = {}

    def add(self, event: PromptDelta | Delta) -> None:
        self.usage.add(event)
        if isinstance(event, Delta):
            self._choices[self._numbered[event.request_id, event.choice_index]].add(event)
        else:
            self._choices |= {
                index: Choice(event)
                for (request_id, _), index in self._numbered.items()
                if request_id == event.request_id
            }

    def choices(self) -> list[Choice]:
        """Raises `GenerationFailed` if one is missing or has no end."""
        choices = [self._choices[index] for index in sorted(self._choices)]
        if len(choices) < len(self._numbered) or not all(choice.finish_reason for choice in choices):
            raise GenerationFailed("the answer ended before all of its choices did")
        return choices


def body(plan: Plan, disclosure: Disclosure, transcript: Transcript) -> dict[str, Any]:
    """The answer to a call that does not stream. Raises `GenerationFailed`."""
    choices = transcript.choices()
    write = _chat_choice if plan.kind == "chatcmpl" else _completion_choice
    answer = plan.head(disclosure)
    answer["choices"] = [{"index": index, **write(plan, choice)} for index, choice in enumerate(choices)]
    answer["usage"] = transcript.usage.to_dict()
    if plan.kind == "chatcmpl":
        answer |= _prompt_facts(plan, choices[0])
    return answer


def _completion_choice(plan: Plan, choice: Choice) -> dict[str, Any]:
    echoed = plan.echo_text(choice.prompt)
    return {
        "text": echoed + "".join(choice.texts),
        "logprobs": _legacy(plan, choice, echoed),
        **_ending(plan, choice),
        **_prompt_facts(plan, choice),
    }


def _chat_choice(plan: Plan, choice: Choice) -> dict[str, Any]:
    asked = plan.request(choice.prompt.request_id).params.logprobs is not None
    return {
        "message": {"role": "assistant", "content": "".join(choice.texts), "refusal": None},
        "logprobs": chat_logprobs(choice.logprobs) if asked else None,
        **_ending(plan, choice),
    }


def _ending(plan: Plan, choice: Choice) -> dict[str, Any]:
    ending: dict[str, Any] = {"finish_reason": choice.finish_reason, "stop_reason": choice.stop_reason}
    if plan.return_token_ids:
        ending["token_ids"] = choice.token_ids
    return ending


def _prompt_facts(plan: Plan, choice: Choice) -> dict[str, Any]:
    """vLLM's extensions: in each choice of a completion, at the top of a chat answer."""
    facts: dict[str, Any] = {}
    if plan.prompt_logprobs:
        facts["prompt_logprobs"] = prompt_logprobs(choice.prompt.logprobs)
    if plan.return_token_ids:
        facts["prompt_token_ids"] = choice.prompt.prompt_token_ids
    return facts


def _legacy(plan: Plan, choice: Choice, echoed: str) -> dict[str, Any] | None:
    asked = plan.request(choice.prompt.request_id).params.logprobs
    if asked is None:
        return None
    writer = LegacyLogprobs(asked)
    before = writer.prompt(choice.prompt, echoed) if plan.echo else {}
    after = writer.output(choice.logprobs)
    return {key: before.get(key, []) + after[key] for key in after}
