"""Log-probabilities in the three shapes that clients know: completions', chat's, and vLLM's for prompts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Final

from serve.generation import PromptDelta, TokenLogprob

__all__ = ["LegacyLogprobs", "chat_logprobs", "prompt_logprobs"]

_FLOOR: Final = -9999.0
"""JSON has no infinity; OpenAI writes this for a token that cannot be."""


class LegacyLogprobs:
    """Completions' four parallel lists for one choice. Remembers the offset, so that chunks continue each other.

    A token that is no whole character is called `bytes:\\xe2\\x80`, as OpenAI does, so that names stay distinct.
    """

    def __init__(self, alternatives: int) -> None:
        self._alternatives = alternatives
        self._offset = 0

    def prompt(self, delta: PromptDelta, text: str) -> dict[str, Any]:
        """Every prompt token; the first has no probability, since nothing predicts it.

        A first token that the text does not begin with is one that the tokenizer added: it takes up no room.
        """
        lists = self._empty()
        for position, token in enumerate(delta.logprobs):
            if token is None:
                self._append_unpredicted(lists, delta, position, text)
            else:
                self._append(lists, token)
        self._offset = len(text)
        return lists

    def output(self, tokens: Iterable[TokenLogprob]) -> dict[str, Any]:
        lists = self._empty()
        for token in tokens:
            self._append(lists, token)
        return lists

    def _append(self, lists: dict[str, Any], token: TokenLogprob) -> None:
        top = {_name(other): _finite(other.logprob) for other in token.top[: self._alternatives]}
        top.setdefault(_name(token), _finite(token.logprob))
        lists["tokens"].append(_name(token))
        lists["token_logprobs"].append(_finite(token.logprob))
        lists["top_logprobs"].append(top)
        lists["text_offset"].append(self._offset)
        self._offset += _width(token)

    def _append_unpredicted(self, lists: dict[str, Any], delta: PromptDelta, position: int, text: str) -> None:
        piece = _first_piece(delta, text)
        lists["tokens"].append(piece)
        lists["token_logprobs"].append(None)
        lists["top_logprobs"].append(None)
        lists["text_offset"].append(self._offset)
        self._offset += len(piece)

    @staticmethod
    def _empty() -> dict[str, Any]:
        return {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}


def _first_piece(delta: PromptDelta, text: str) -> str:
    """What of the text the other tokens leave to the first one; "" for a token that the tokenizer added."""
    rest = "".join(token.text for token in delta.logprobs if token is not None)
    return text.removesuffix(rest) if text.endswith(rest) else ""


def chat_logprobs(tokens: Iterable[TokenLogprob]) -> dict[str, Any]:
    return {
        "content": [{**_chat_token(token), "top_logprobs": [_chat_token(t) for t in token.top]} for token in tokens],
        "refusal": None,
    }


def prompt_logprobs(tokens: Sequence[TokenLogprob | None]) -> list[dict[str, Any] | None]:
    """vLLM's extension: by token id, the prompt's token and its alternatives."""
    return [None if token is None else {str(t.token_id): _ranked(t) for t in (token, *token.top)} for token in tokens]


def _chat_token(token: TokenLogprob) -> dict[str, Any]:
    return {"token": token.text, "logprob": _finite(token.logprob), "bytes": list(token.bytes)}


def _ranked(token: TokenLogprob) -> dict[str, Any]:
    return {"logprob": _finite(token.logprob), "rank": token.rank, "decoded_token": token.text}


def _name(token: TokenLogprob) -> str:
    if "�" not in token.text or not token.bytes:
        return token.text
    return "bytes:" + "".join(f"\\x{byte:02x}" for byte in token.bytes)


def _width(token: TokenLogprob) -> int:
    """Characters that begin in this token: its UTF-8 bytes without the continuation bytes."""
    return sum(byte & 0xC0 != 0x80 for byte in token.bytes) if token.bytes else len(token.text)


def _finite(logprob: float) -> float:
    return max(_FLOOR, logprob)
