"""Tokens to text, a token at a time: whole characters only, and never part of a stop string.

Two things hold text back. A character may be spread over several tokens, so text that ends in an unfinished one waits.
And text that could be the beginning of a stop string waits until it is clear that it is not.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

from serve.engine.vocabulary import Vocabulary
from serve.generation import SamplingParams

__all__ = ["Detokenizer", "StopMatch", "StopStrings", "TextStream"]

_UNFINISHED = "\ufffd"
_CONTEXT_TOKENS = 5
"""Tokens before the new ones that are decoded with them: decoders treat the first token of a text in a special way."""
_LONGEST_WAIT_TOKENS = 16
"""A character has at most four bytes: a longer run of unfinished ones is not text, and is shown as it is."""


class Detokenizer:
    """Text of the tokens after a prompt. The pieces joined are what decoding prompt and output adds to the prompt."""

    def __init__(self, vocabulary: Vocabulary, prompt: SequenceOf[int], *, skip_special_tokens: bool) -> None:
        self._vocabulary = vocabulary
        self._skip_special_tokens = skip_special_tokens
        self._window = list(prompt[-_CONTEXT_TOKENS:])
        """Context, then the tokens whose text is not out yet."""
        self._context_length = len(self._window)
        self._context_text = self._decode(self._window)

    def push(self, token_id: int) -> str:
        """The characters that this token completes; "" while one is unfinished."""
        self._window.append(token_id)
        text = self._decode(self._window)
        waiting = len(self._window) - self._context_length
        if text.endswith(_UNFINISHED) and waiting < _LONGEST_WAIT_TOKENS:
            return ""
        return self._release(text)

    def flush(self) -> str:
        """What is left when no more tokens come: unfinished characters, as replacement characters."""
        return self._release(self._decode(self._window))

    def _release(self, text: str) -> str:
        new = text[_shared_length(text, self._context_text) :]
        if not new:
            del self._window[self._context_length :]  # tokens without text: special ones, skipped
            return ""
        self._window = self._window[self._context_length :][-_CONTEXT_TOKENS:]
        self._context_length = len(self._window)
        self._context_text = self._decode(self._window)
        return new

    def _decode(self, token_ids: SequenceOf[int]) -> str:
        return self._vocabulary.decode(token_ids, skip_special_tokens=self._skip_special_tokens)


@dataclass(frozen=True, slots=True)
class StopMatch:
    """Text that may go out, and the stop string that ended it, if one did."""

    text: str
    stop: str | None = None


class StopStrings:
    """Finds stop strings in text that arrives in pieces."""

    def __init__(self, stops: tuple[str, ...], *, include: bool) -> None:
        self._stops = stops
        self._include = include
        self._held = ""

    def push(self, text: str) -> StopMatch:
        """New text in, text that cannot become part of a stop string out."""
        self._held += text
        found = [(at, stop) for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if found:
            at, stop = min(found)
            return StopMatch(self._held[: at + len(stop) if self._include else at], stop)
        keep = max((_overlap(self._held, stop) for stop in self._stops), default=0)
        out, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return StopMatch(out)

    def flush(self) -> str:
        """What was held back, once nothing can follow it."""
        held, self._held = self._held, ""
        return held


class TextStream:
    """The text of one choice: detokenized, and cut at its stop strings."""

    def __init__(self, vocabulary: Vocabulary, prompt: SequenceOf[int], params: SamplingParams) -> None:
        self._tokens = Detokenizer(vocabulary, prompt, skip_special_tokens=params.skip_special_tokens)
        self._stops = StopStrings(params.stop, include=params.include_stop_str_in_output)

    def push(self, token_id: int, *, may_stop: bool = True) -> StopMatch:
        """`may_stop` is False before `min_tokens` are out: text goes through unsearched."""
        text = self._tokens.push(token_id)
        if not may_stop:
            return StopMatch(text)
        return self._stops.push(text)

    def flush(self) -> StopMatch:
        """The end of the text: everything that was held back, unless it completes a stop string."""
        match = self._stops.push(self._tokens.flush())
        return match if match.stop is not None else StopMatch(match.text + self._stops.flush())


def _shared_length(text: str, context: str) -> int:
    """How much of `text` is context. A prompt cut inside a character ends in one that the next token changes."""
    if text.startswith(context):
        return len(context)
    pairs = zip(text, context, strict=False)
    return next((index for index, (ours, theirs) in enumerate(pairs) if ours != theirs), min(len(text), len(context)))


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`, without being all of it."""
    longest = min(len(text), len(stop) - 1)
    return next((length for length in range(longest, 0, -1) if text.endswith(stop[:length])), 0)
