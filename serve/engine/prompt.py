"""From what a client sent to token ids: text through the tokenizer, a conversation through the model's chat template.

Blocking work; the replica calls it off its event loop. Only the checkpoint's own template is ever rendered.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from serve.engine.template import TemplateFailed, TemplateProcess
from serve.errors import ContextLengthExceeded, InvalidRequest
from serve.generation import Chat, Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["PromptEncoder"]

_LONGEST_TOKEN_CHARACTERS = 256
"""Text that is longer than this times the context is refused before it is tokenized."""


class PromptEncoder:
    """Encodes prompts for one model. Calls may come from any thread."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, *, max_model_len: int | None = None, template_timeout_s: float = 2.0
    ) -> None:
        self._tokenizer = tokenizer
        self._max_characters = None if max_model_len is None else max_model_len * _LONGEST_TOKEN_CHARACTERS
        self._template = _template_process(tokenizer, template_timeout_s)

    @property
    def has_chat_template(self) -> bool:
        return self._template is not None

    def encode(self, prompt: Prompt, *, add_special_tokens: bool = True) -> tuple[int, ...]:
        """Token ids of a prompt. Raises InvalidRequest or ContextLengthExceeded, naming `prompt` or `messages`."""
        if isinstance(prompt, tuple):
            return prompt
        if isinstance(prompt, Chat):
            # The template writes the special tokens itself.
            return self._tokenize(self.render(prompt), add_special_tokens=False, param="messages")
        return self._tokenize(prompt, add_special_tokens=add_special_tokens, param="prompt")

    def render(self, chat: Chat) -> str:
        """A conversation as the text that the model was trained on. Raises InvalidRequest."""
        if self._template is None:
            raise InvalidRequest("this model has no chat template; use /v1/completions", param="messages")
        for message in chat.messages:
            _check_text(str(message), "messages")
        try:
            text = self._template.render(
                messages=[dict(message) for message in chat.messages],
                add_generation_prompt=chat.add_generation_prompt and not chat.continue_final_message,
            )
        except TemplateFailed as error:
            raise InvalidRequest(
                f"the model's chat template refused these messages: {error}", param="messages"
            ) from error
        return _continued(text, chat.messages[-1]) if chat.continue_final_message else text

    def close(self) -> None:
        if self._template is not None:
            self._template.close()

    def _tokenize(self, text: str, *, add_special_tokens: bool, param: str) -> tuple[int, ...]:
        if self._max_characters is not None and len(text) > self._max_characters:
            raise ContextLengthExceeded(f"the prompt has {len(text)} characters, far over the context", param=param)
        _check_text(text, param)
        token_ids = self._tokenizer(text, add_special_tokens=add_special_tokens, verbose=False)["input_ids"]
        return tuple(token_ids)


def _check_text(text: str, param: str) -> None:
    if "\0" in text:
        raise InvalidRequest("text may not contain the character U+0000", param=param)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidRequest("text may not contain half of a surrogate pair", param=param) from error


def _continued(text: str, final: Mapping[str, Any]) -> str:
    """A rendered conversation without what its template puts after the final message."""
    content = str(final.get("content", "")).strip()
    end = text.rfind(content) + len(content)
    if not content or end < len(content):
        raise InvalidRequest("the final message cannot be continued: its text is empty or changed", param="messages")
    return text[:end]


def _template_process(tokenizer: PreTrainedTokenizerBase, timeout_s: float) -> TemplateProcess | None:
    template = tokenizer.chat_template
    if isinstance(template, dict):
        template = template.get("default")
    if template is None:
        return None
    return TemplateProcess(template, dict(tokenizer.special_tokens_map), timeout_s=timeout_s)
