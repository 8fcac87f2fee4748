"""Does an answer repeat itself to its end? Broken weights and broken caches show so, long before anyone complains."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

__all__ = ["WINDOW_TOKENS", "is_looping"]

WINDOW_TOKENS: Final = 64
_LONGEST_CYCLE_TOKENS: Final = 16


def is_looping(last_token_ids: Sequence[int]) -> bool:
    """The last 64 tokens are one cycle of at most 16 tokens, at least four times over. Shorter answers never are."""
    window = list(last_token_ids)[-WINDOW_TOKENS:]
    return len(window) == WINDOW_TOKENS and any(
        window[cycle:] == window[:-cycle] for cycle in range(1, _LONGEST_CYCLE_TOKENS + 1)
    )
