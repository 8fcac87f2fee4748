"""Chooses tokens from logits, for all rows of a step at once. Knows nothing of text or of when a text ends.

A token is drawn by its number in [0, 1) (`noise`) on the cumulated probabilities in the vocabulary's order, not in
order of probability: two tokens that swap ranks by rounding must not change what is drawn. Cuts (top-k, top-p, min-p)
keep every token at least as likely as the last one inside, so ties do not depend on a sort's order either.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

import torch
from torch import Tensor

from serve.engine.noise import uniform
from serve.engine.processors import process
from serve.engine.sequence import Sequence

__all__ = ["RowLogprobs", "choose", "keep_min_p", "keep_top_k", "keep_top_p", "row_logprobs"]

_HIDDEN = float("-inf")
_FIRST_CANDIDATES = 256
_LARGEST_UNIFORM = 1 - 2.0**-24


@dataclass(frozen=True, slots=True)
class RowLogprobs:
    """Natural-log probabilities of one position under the raw distribution: the token's, its rank and the likeliest."""

    token_id: int
    logprob: float
    rank: int
    top_ids: tuple[int, ...]
    top_logprobs: tuple[float, ...]


def choose(
    logits: Tensor, sequences: SequenceOf[Sequence], end_ids: SequenceOf[int], best: SequenceOf[int] | None = None
) -> list[int]:
    """One token per row. logits: [R, vocab] in fp32, one row for each sequence; left as they are. best: their argmax,
    where it is known; of more rows, if there are more, and -1 where that is no number."""
    processed = process(logits, sequences, end_ids)
    known = best is not None and processed is logits
    tokens = [max(token, 0) for token in best[: len(sequences)]] if best and known else processed.argmax(-1).tolist()
    rows = [row for row, sequence in enumerate(sequences) if sequence.params.temperature > 0]
    if rows:
        everyone = len(rows) == len(sequences)
        drawn = _draw(processed if everyone else processed[rows], [sequences[row] for row in rows]).tolist()
        for row, token in zip(rows, drawn, strict=True):
            tokens[row] = token
    return tokens


def row_logprobs(logits: Tensor, token_ids: SequenceOf[int], top: SequenceOf[int]) -> list[RowLogprobs]:
    """logits: [R, vocab] raw; token_ids and the number of alternatives to report: one per row."""
    tokens = torch.tensor(token_ids, device=logits.device)[:, None]
    chosen = logits.gather(1, tokens)
    normalizer = logits.logsumexp(-1, keepdim=True)
    logprobs = (chosen - normalizer)[:, 0].tolist()
    ranks = ((logits > chosen).sum(-1) + 1).tolist()
    best = logits.topk(min(max(top), logits.shape[1]), -1)
    best_ids, best_logprobs = best.indices.tolist(), (best.values - normalizer).tolist()
    return [
        RowLogprobs(token, logprob, rank, tuple(ids[:count]), tuple(values[:count]))
        for token, logprob, rank, ids, values, count in zip(
            token_ids, logprobs, ranks, best_ids, best_logprobs, top, strict=True
        )
    ]


def keep_top_k(logits: Tensor, top_k: SequenceOf[int]) -> Tensor:
    """Hide all but the `top_k` likeliest tokens of each row; 0 keeps all. In place."""
    vocabulary = logits.shape[1]
    counts = [min(k, vocabulary) if k > 0 else vocabulary for k in top_k]
    rows = [row for row, count in enumerate(counts) if count < vocabulary]
    if rows:
        best = logits[rows].topk(max(counts[row] for row in rows), -1).values
        last = torch.tensor([counts[row] - 1 for row in rows], device=logits.device)[:, None]
        logits[rows] = logits[rows].masked_fill(logits[rows] < best.gather(1, last), _HIDDEN)
    return logits


def keep_top_p(logits: Tensor, top_p: SequenceOf[float]) -> Tensor:
    """Hide the tail: keep the likeliest tokens until they hold `top_p` of the probability (arXiv 1904.09751). In place.

    The border nearly always lies among a few hundred candidates, and finding those is far cheaper than sorting a
    vocabulary; rows where it does not are tried again with more.
    """
    rows = [row for row, p in enumerate(top_p) if p < 1.0]
    count = _FIRST_CANDIDATES
    while rows:
        probabilities = logits[rows].softmax(-1)
        count = min(count, logits.shape[1])
        best = probabilities.topk(count, -1).values
        wanted = torch.tensor([top_p[row] for row in rows], device=logits.device)[:, None]
        inside = (best.cumsum(-1) - best < wanted).sum(-1, keepdim=True).clamp(min=1)
        settled = (inside < count) | (count == logits.shape[1])
        least = best.gather(1, inside - 1).masked_fill(~settled, 0.0)
        logits[rows] = logits[rows].masked_fill(probabilities < least, _HIDDEN)
        rows = [row for row, done in zip(rows, settled[:, 0].tolist(), strict=True) if not done]
        count *= 8
    return logits


def keep_min_p(logits: Tensor, min_p: SequenceOf[float]) -> Tensor:
    """Hide tokens less likely than `min_p` times the likeliest (arXiv 2407.01082). In place."""
    if any(min_p):
        border = logits.amax(-1, keepdim=True) + torch.tensor(min_p, device=logits.device)[:, None].log()
        logits.masked_fill_(logits < border, _HIDDEN)
    return logits


def _draw(logits: Tensor, sequences: SequenceOf[Sequence]) -> Tensor:
    """[R] tokens drawn at each row's temperature."""
    params = [sequence.params for sequence in sequences]
    logits = logits / torch.tensor([p.temperature for p in params], device=logits.device)[:, None]
    keep_min_p(logits, [p.min_p for p in params])
    keep_top_k(logits, [p.top_k for p in params])
    keep_top_p(logits, [p.top_p for p in params])
    cumulated = logits.softmax(-1).cumsum(-1)
    luck = [min(uniform(s.params.seed, s.choice_index, s.num_output_tokens), _LARGEST_UNIFORM) for s in sequences]
    total = cumulated[:, -1:].contiguous()
    aim = torch.tensor(luck, dtype=cumulated.dtype, device=logits.device)[:, None] * total
    drawn = torch.searchsorted(cumulated, aim, right=True)
    # Rounding may carry the aim to the very end: the last token that has any probability is the one meant.
    return torch.minimum(drawn, torch.searchsorted(cumulated, total))[:, 0]
