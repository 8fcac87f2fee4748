"""How much one request may ask for. The caps on fields are constants, visible in the OpenAPI document; what depends on
the machine, or on the network in front of it, is in `Limits`. Standard library only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

__all__ = [
    "MAX_CHOICES",
    "MAX_LOGIT_BIAS",
    "MAX_LOGPROBS",
    "MAX_MESSAGES",
    "MAX_PROMPTS",
    "MAX_STOP_CHARS",
    "MAX_STOP_STRINGS",
    "MAX_STOP_TOKEN_IDS",
    "MAX_TOKEN_ID",
    "Limits",
]

MAX_CHOICES: Final = 128
"""Prompts times `n`, in one call."""
MAX_PROMPTS: Final = 128
MAX_LOGPROBS: Final = 20
MAX_STOP_STRINGS: Final = 16
MAX_STOP_CHARS: Final = 256
MAX_STOP_TOKEN_IDS: Final = 128
MAX_LOGIT_BIAS: Final = 1024
MAX_MESSAGES: Final = 4096
MAX_TOKEN_ID: Final = 2**31 - 1


@dataclass(frozen=True, slots=True)
class Limits:
    """What a request may cost before it is understood.

    body_elements: commas and opening brackets in a body, which bound what its lists and objects hold together; a long
        prompt of token ids must fit. 300,000 parse in at most 0.2 s on one core.
    write_timeout_s: how long a client may leave an answer unread before it counts as gone.
    """

    body_bytes: int = 8 * 1024 * 1024
    body_elements: int = 300_000
    body_timeout_s: float = 30.0
    write_timeout_s: float = 60.0
    header_bytes: int = 32 * 1024
    header_count: int = 128
