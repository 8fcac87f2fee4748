"""`POST /v1/chat/completions`: a conversation, rendered by the model's own template in the replica."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, model_validator

from serve.api.limits import MAX_LOGPROBS, MAX_MESSAGES
from serve.api.schema.body import Body, wrong
from serve.api.schema.sampling import Flag, GenerationBody
from serve.api.schema.text import Content, Text
from serve.errors import InvalidRequest
from serve.generation import Chat, GenerationRequest

__all__ = ["ChatBody", "Conversation", "Message"]

OutputTokens = Annotated[int, Field(ge=1, le=2**31 - 1)]


class Message(Body):
    role: Annotated[str, Field(min_length=1, max_length=64)]
    content: Content
    name: Annotated[Text, Field(max_length=256)] | None = None
    tool_call_id: Annotated[Text, Field(max_length=256)] | None = None
    tool_calls: Any = None


class Conversation(Body):
    """The part of a body that becomes a prompt; /tokenize takes the same."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES)]
    add_generation_prompt: bool | None = None
    continue_final_message: Flag = False
    add_special_tokens: Flag = Field(default=False, description="The template has its own; true adds them again.")

    @model_validator(mode="before")
    @classmethod
    def _cap(cls, raw: Any) -> Any:
        """Before the messages are looked at one by one."""
        messages = raw.get("messages") if isinstance(raw, dict) else None
        if isinstance(messages, list) and len(messages) > MAX_MESSAGES:
            raise wrong(f"must hold at most {MAX_MESSAGES} messages, got {len(messages)}", "messages")
        return raw

    def chat(self) -> Chat:
        if self.continue_final_message and self.add_generation_prompt is not False:
            raise InvalidRequest(
                "continue_final_message needs add_generation_prompt: false", param="continue_final_message"
            )
        for index, message in enumerate(self.messages):
            if message.tool_calls:
                path = f"messages[{index}].tool_calls"
                raise InvalidRequest(f"{path} is not supported: this server calls no tools", param=path)
        return Chat(
            messages=tuple(message.model_dump(exclude_none=True, exclude={"tool_calls"}) for message in self.messages),
            add_generation_prompt=self.add_generation_prompt is not False,
            continue_final_message=self.continue_final_message,
        )


class ChatBody(GenerationBody, Conversation):
    kind = "chatcmpl"

    max_tokens: OutputTokens | None = Field(default=None, json_schema_extra={"deprecated": True})
    max_completion_tokens: OutputTokens | None = Field(
        default=None, description="Absent: as many as the context allows. Goes before `max_tokens`."
    )
    logprobs: Flag = False
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    tools: Any = None
    tool_choice: Any = None
    response_format: Any = None
    modalities: Any = None

    def requests(self, call_id: str) -> tuple[GenerationRequest, ...]:
        """The one request. Raises `InvalidRequest` where fields contradict each other or ask for what is not here."""
        max_tokens = self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens
        self.check(max_tokens)
        self._check_text_only()
        if self.top_logprobs is not None and not self.logprobs:
            raise InvalidRequest("top_logprobs needs logprobs: true", param="top_logprobs")
        params = self.sampling(
            max_tokens=max_tokens,
            logprobs=(self.top_logprobs or 0) if self.logprobs else None,
            prompt_logprobs=self.prompt_logprobs,
        )
        return (
            GenerationRequest(
                request_id=f"{call_id}-0",
                prompt=self.chat(),
                params=params,
                n=self.choices,
                add_special_tokens=self.add_special_tokens,
            ),
        )

    def _check_text_only(self) -> None:
        if self.tools and self.tool_choice != "none":
            raise _unsupported("tools", "this server calls no tools; send tool_choice: 'none' to be answered in text")
        if self.tool_choice not in (None, "none", "auto"):
            raise _unsupported("tool_choice", "this server calls no tools")
        if self.response_format not in (None, {"type": "text"}):
            raise _unsupported("response_format", "this server has no structured output")
        if self.modalities not in (None, [], ["text"]):
            raise _unsupported("modalities", "text only")


def _unsupported(param: str, reason: str) -> InvalidRequest:
    return InvalidRequest(f"{param} is not supported: {reason}", param=param, code="unsupported_parameter")
