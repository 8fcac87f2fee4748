"""What changes logits before a token is chosen, in vLLM's order: ends held back, biases, penalties.

Each function edits `logits` [R, vocab] (fp32) in place, for those rows whose request asks for it.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from serve.engine.sequence import Sequence

__all__ = ["add_bias", "hold_back_ends", "penalize", "process"]


def process(logits: Tensor, sequences: SequenceOf[Sequence], end_ids: SequenceOf[int]) -> Tensor:
    """Logits after every processor; the same tensor where no request asks for one."""
    if not any(_changes(sequence) for sequence in sequences):
        return logits
    logits = logits.clone()
    hold_back_ends(logits, sequences, end_ids)
    add_bias(logits, sequences)
    penalize(logits, sequences)
    return logits


def hold_back_ends(logits: Tensor, sequences: SequenceOf[Sequence], end_ids: SequenceOf[int]) -> None:
    """No token that would end the text before `min_tokens` are out."""
    cells = [
        (row, token)
        for row, sequence in enumerate(sequences)
        if sequence.num_output_tokens < sequence.params.min_tokens
        for token in (*(() if sequence.params.ignore_eos else end_ids), *sequence.params.stop_token_ids)
        if token < logits.shape[1]
    ]
    if cells:
        rows, tokens = torch.tensor(cells, device=logits.device).unbind(1)
        logits[rows, tokens] = float("-inf")


def add_bias(logits: Tensor, sequences: SequenceOf[Sequence]) -> None:
    """OpenAI's `logit_bias`."""
    cells = [(row, token) for row, sequence in enumerate(sequences) for token in sequence.params.logit_bias]
    if cells:
        rows, tokens = torch.tensor(cells, device=logits.device).unbind(1)
        bias = [value for sequence in sequences for value in sequence.params.logit_bias.values()]
        logits.index_put_((rows, tokens), torch.tensor(bias, device=logits.device), accumulate=True)


def penalize(logits: Tensor, sequences: SequenceOf[Sequence]) -> None:
    """Repetition penalty over prompt and output (arXiv 1909.05858); presence and frequency ones over the output."""
    rows = [row for row, sequence in enumerate(sequences) if _penalizes(sequence)]
    if not rows:
        return
    chosen = [sequences[row] for row in rows]
    picked = logits[rows]
    repetition, presence, frequency = (
        torch.tensor([getattr(sequence.params, name) for sequence in chosen], device=logits.device)[:, None]
        for name in ("repetition_penalty", "presence_penalty", "frequency_penalty")
    )
    output_counts = _counts([s.tokens[s.num_prompt_tokens :] for s in chosen], picked)
    seen = _counts([s.tokens for s in chosen], picked) > 0
    picked = torch.where(seen, torch.where(picked > 0, picked / repetition, picked * repetition), picked)
    logits[rows] = picked - frequency * output_counts - presence * (output_counts > 0)


def _counts(tokens: SequenceOf[SequenceOf[int]], like: Tensor) -> Tensor:
    """How often each token of the vocabulary occurs: [R, vocab]."""
    padding = like.shape[1]
    padded = pad_sequence([torch.tensor(t, dtype=torch.long) for t in tokens], batch_first=True, padding_value=padding)
    padded = padded.to(like.device)
    counts = like.new_zeros(like.shape[0], padding + 1)
    return counts.scatter_add_(1, padded, torch.ones_like(padded, dtype=like.dtype))[:, :padding]


def _penalizes(sequence: Sequence) -> bool:
    params = sequence.params
    return params.repetition_penalty != 1.0 or params.presence_penalty != 0.0 or params.frequency_penalty != 0.0


def _changes(sequence: Sequence) -> bool:
    return bool(
        _penalizes(sequence) or sequence.params.logit_bias or sequence.num_output_tokens < sequence.params.min_tokens
    )
