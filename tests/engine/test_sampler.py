from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from serve.engine import sampler
from serve.engine.noise import uniform
from serve.engine.processors import process
from serve.engine.sampler import choose, keep_min_p, keep_top_k, keep_top_p, row_logprobs
from serve.engine.sequence import Sequence
from serve.generation import SamplingParams

VOCABULARY = 50


def sequence(prompt: list[int], output: list[int] | None = None, choice: int = 0, **params: Any) -> Sequence:
    sampling = SamplingParams(**{"temperature": 1.0} | params)
    return Sequence("r", choice, prompt + (output or []), len(prompt), sampling, 10, 0)


def logits(rows: int = 1, seed: int = 0, vocabulary: int = VOCABULARY) -> Tensor:
    return torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(seed)) * 3


def kept(hidden: Tensor) -> list[list[int]]:
    return [row.isfinite().nonzero()[:, 0].tolist() for row in hidden]


def draws(count: int, row: Tensor, **params: Any) -> Tensor:
    """Frequencies of `count` independent draws from one row of logits."""
    sequences = [sequence([1], seed=seed, **params) for seed in range(count)]
    return torch.bincount(torch.tensor(choose(row.expand(count, -1), sequences, [])), minlength=row.shape[-1]) / count


def test_draws_follow_the_distribution() -> None:
    row = logits(vocabulary=8)
    torch.testing.assert_close(draws(20_000, row), row[0].softmax(-1), rtol=0, atol=0.015)


def test_temperature_sharpens_the_distribution() -> None:
    row = logits(vocabulary=8)
    torch.testing.assert_close(draws(20_000, row, temperature=0.5), (row[0] * 2).softmax(-1), rtol=0, atol=0.015)


def test_every_cut_at_once_still_draws_inside_all_of_them() -> None:
    row = logits()
    drawn = draws(500, row, top_k=10, top_p=0.8, min_p=0.05).nonzero()[:, 0].tolist()
    inside = set(kept(keep_top_p(keep_top_k(keep_min_p(row.clone(), [0.05]), [10]), [0.8]))[0])
    assert set(drawn) <= inside


def test_temperature_zero_is_greedy_beside_sampled_rows() -> None:
    rows = logits(3)
    tokens = choose(rows, [sequence([1]), sequence([1], temperature=0.0), sequence([1], seed=5)], [])
    assert tokens[1] == int(rows[1].argmax())


def test_choosing_leaves_the_raw_logits_alone() -> None:
    rows = logits(2)
    before = rows.clone()
    choose(rows, [sequence([1], top_k=3, logit_bias={4: 9.0}), sequence([1], presence_penalty=1.0)], [])
    assert torch.equal(rows, before)


@given(st.integers(0, 1000), st.floats(0.01, 0.999))
def test_top_p_keeps_the_smallest_likely_set_that_reaches_p(seed: int, p: float) -> None:
    row = logits(seed=seed)
    (inside,) = kept(keep_top_p(row.clone(), [p]))
    probabilities = row[0].softmax(-1)
    assert probabilities[inside].sum() >= p - 1e-5
    least = min(inside, key=lambda token: float(probabilities[token]))
    assert probabilities[inside].sum() - probabilities[least] < p + 1e-5
    assert set(inside) == set(probabilities.topk(len(inside)).indices.tolist())


def test_top_p_beyond_the_first_candidates_equals_a_full_sort(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = logits(4, vocabulary=3000)
    thorough = keep_top_p(rows.clone(), [0.5, 0.9, 1.0, 0.9999])
    monkeypatch.setattr(sampler, "_FIRST_CANDIDATES", 2)
    assert torch.equal(keep_top_p(rows.clone(), [0.5, 0.9, 1.0, 0.9999]), thorough)


def test_top_k_is_per_row_and_zero_keeps_all() -> None:
    rows = logits(4)
    assert [len(row) for row in kept(keep_top_k(rows, [1, 7, 0, 10**9]))] == [1, 7, VOCABULARY, VOCABULARY]


def test_min_p_is_relative_to_the_likeliest() -> None:
    row = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    assert kept(keep_min_p(row, [0.31])) == [[0, 1]]


def test_bias_and_penalties_change_what_is_chosen() -> None:
    row = torch.tensor([[4.0, 3.0, 2.0, 1.0]])

    def best(prompt: list[int], output: list[int], **params: Any) -> int:
        return choose(row, [sequence(prompt, output, temperature=0.0, **params)], [])[0]

    assert best([3], [0]) == 0
    assert best([3], [0], logit_bias={2: 5.0}) == 2
    assert best([3], [0], presence_penalty=1.5) == 1
    assert best([0], [], presence_penalty=1.5) == 0, "presence looks at the output only"
    assert best([0], [], repetition_penalty=2.0) == 1, "repetition looks at the prompt too"
    assert best([3], [0, 0], frequency_penalty=0.6) == 1
    assert best([3], [0], frequency_penalty=0.6) == 0


def test_repetition_penalty_pushes_negative_logits_down() -> None:
    row = process(torch.tensor([[2.0, -2.0]]), [sequence([0, 1], repetition_penalty=2.0)], [])
    assert row.tolist() == [[1.0, -4.0]]


def test_ends_are_held_back_until_min_tokens_are_out() -> None:
    row = torch.tensor([[9.0, 8.0, 7.0, 1.0]])
    early = sequence([3], [3], min_tokens=2, stop_token_ids=(1,), temperature=0.0)
    late = sequence([3], [3, 3], min_tokens=2, stop_token_ids=(1,), temperature=0.0)
    assert choose(row.expand(2, -1), [early, late], [0]) == [2, 0]


def test_noise_depends_on_seed_choice_and_position_only() -> None:
    keys = [(seed, choice, position) for seed in (0, 1, -5, 2**63) for choice in range(4) for position in range(50)]
    numbers = [uniform(*key) for key in keys]
    assert numbers == [uniform(*key) for key in keys]
    assert len(set(numbers)) == len(numbers)
    assert all(0 <= number < 1 for number in numbers)
    assert abs(sum(numbers) / len(numbers) - 0.5) < 0.03


def test_a_row_is_drawn_alike_in_any_batch() -> None:
    rows = logits(16)
    sequences = [sequence([1], seed=seed, top_p=0.9) for seed in range(16)]
    together = choose(rows, sequences, [])
    assert [choose(rows[i : i + 1], sequences[i : i + 1], [])[0] for i in range(16)] == together


def test_logprobs_are_raw_with_rank_and_alternatives() -> None:
    rows = logits(2)
    expected = rows.log_softmax(-1)
    first, second = row_logprobs(rows, [7, int(rows[1].argmax())], [3, 0])
    assert first.logprob == pytest.approx(float(expected[0, 7]), abs=1e-5)
    assert first.rank == int((rows[0] > rows[0, 7]).sum()) + 1
    assert list(first.top_ids) == expected[0].topk(3).indices.tolist()
    assert first.top_logprobs == pytest.approx(expected[0].topk(3).values.tolist(), abs=1e-5)
    assert (second.rank, second.top_ids) == (1, ())
