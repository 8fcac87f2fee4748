"""Text that the teacher writes itself: as much as wanted, where there is no other, or not enough.

Tokens are drawn from its whole distribution, neither top-k nor top-p: what it finds unlikely is also worth learning.
Every batch has a seed of its own, so the same request gives the same text.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase

from serve.compression.compress import Progress, silent
from serve.errors import CheckpointError

__all__ = ["sample_texts"]

_BATCH = 64


def sample_texts(
    teacher: Any,
    tokenizer: PreTrainedTokenizerBase,
    count: int,
    *,
    max_tokens: int,
    ends: tuple[int, ...] = (),
    seed: int = 0,
    progress: Progress = silent,
) -> list[list[int]]:
    """`count` texts of token ids from the tokenizer's first token on, each up to one of `ends` or `max_tokens`.

    Raise `CheckpointError` where the tokenizer knows no token that a text could begin with.
    """
    first = next((i for i in (tokenizer.bos_token_id, tokenizer.eos_token_id) if isinstance(i, int)), None)
    if first is None:
        raise CheckpointError("the tokenizer has no token to begin a text with; name a text to learn from instead")
    texts: list[list[int]] = []
    for start in range(0, count, _BATCH):
        progress("sample", start, count)
        size = min(_BATCH, count - start)
        texts += [_until(row, ends) for row in _sample(teacher, first, size, max_tokens, ends, seed + start).tolist()]
    return texts


@torch.no_grad()
def _sample(teacher: Any, first: int, size: int, max_tokens: int, ends: tuple[int, ...], seed: int) -> torch.Tensor:
    prompt = torch.full((size, 1), first, device=teacher.device)
    settings = GenerationConfig(  # type: ignore[no-untyped-call]
        do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_length=max_tokens,
        eos_token_id=list(ends) or None, pad_token_id=first,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        found: torch.Tensor = teacher.generate(
            prompt, attention_mask=torch.ones_like(prompt), generation_config=settings
        )
    return found


def _until(row: list[int], ends: tuple[int, ...]) -> list[int]:
    """Up to the first end, which counts; the first token, which may be one, does not."""
    last = next((place for place, token in enumerate(row) if place and token in ends), len(row) - 1)
    return row[: last + 1]
