"""Tokens as the text and bytes they stand for. Wraps a transformers tokenizer; knows no request."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from functools import cache
from typing import TYPE_CHECKING, Any

from serve.engine.sampler import RowLogprobs
from serve.generation import TokenLogprob

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Vocabulary"]

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class Vocabulary:
    """Decoding of one tokenizer, with the exact bytes of every token where its kind tells them."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._fast = _fast_decoder(tokenizer)
        self._decoders = _decoder_types(tokenizer)
        self._added = {index: str(token) for index, token in tokenizer.added_tokens_decoder.items()}
        self.end_ids = _ids(tokenizer.eos_token_id)
        self._bytes_by_id: dict[int, bytes] = {}

    def decode(self, token_ids: SequenceOf[int], *, skip_special_tokens: bool = True) -> str:
        """Text of a run of tokens, just as they stand: no spaces are cleaned up."""
        if self._fast is not None:
            return self._fast(list(token_ids), skip_special_tokens)
        text = self._tokenizer.decode(
            list(token_ids), skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False
        )
        assert isinstance(text, str)
        return text

    def bytes_of(self, token_id: int) -> bytes:
        """The UTF-8 bytes of one token, which may be part of a character."""
        found = self._bytes_by_id.get(token_id)
        if found is None:
            found = self._bytes_by_id[token_id] = self._find_bytes(token_id)
        return found

    def token_logprob(self, row: RowLogprobs) -> TokenLogprob:
        """A position's log-probabilities with its tokens as text."""
        top = tuple(
            self._one(token, logprob, rank)
            for rank, (token, logprob) in enumerate(zip(row.top_ids, row.top_logprobs, strict=True), 1)
        )
        return self._one(row.token_id, row.logprob, row.rank, top)

    def _one(self, token_id: int, logprob: float, rank: int, top: tuple[TokenLogprob, ...] = ()) -> TokenLogprob:
        raw = self.bytes_of(token_id)
        return TokenLogprob(token_id, raw.decode("utf-8", "replace"), logprob, tuple(raw), rank, top)

    def _find_bytes(self, token_id: int) -> bytes:
        if token_id in self._added:
            return self._added[token_id].encode()
        token = self._tokenizer.convert_ids_to_tokens(token_id)
        if not isinstance(token, str):  # a row of a padded embedding that no token uses
            return b""
        if "ByteLevel" in self._decoders:
            return bytes(_bytes_by_character()[character] for character in token)
        if "ByteFallback" in self._decoders and (byte := _BYTE_TOKEN.fullmatch(token)):
            return bytes([int(byte[1], 16)])
        if self._decoders & {"ByteFallback", "Metaspace"}:
            return token.replace("▁", " ").encode()
        return self.decode([token_id], skip_special_tokens=False).encode()


def _ids(value: int | list[int] | None) -> tuple[int, ...]:
    if value is None:
        return ()
    return (value,) if isinstance(value, int) else tuple(value)


def _fast_decoder(tokenizer: PreTrainedTokenizerBase) -> Callable[[list[int], bool], str] | None:
    """What decoding comes down to where a class adds nothing of its own: a quarter of the time, twice a token."""
    from transformers import PreTrainedTokenizerFast as Fast

    kind: Any = type(tokenizer)
    plain = isinstance(tokenizer, Fast) and kind.decode is Fast.decode and kind._decode is Fast._decode
    return tokenizer.backend_tokenizer.decode if plain else None


def _decoder_types(tokenizer: PreTrainedTokenizerBase) -> frozenset[str]:
    """The kinds of decoder in a fast tokenizer; none for a slow one, whose tokens are decoded one by one."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return frozenset()
    if backend.decoder is None:
        return frozenset()
    decoder: dict[str, Any] = json.loads(backend.decoder.__getstate__())  # all of `to_str` would be megabytes
    return frozenset(part["type"] for part in decoder.get("decoders", [decoder]))


@cache
def _bytes_by_character() -> dict[str, int]:
    """GPT-2's printable stand-ins for bytes, backwards."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}
