"""Structured pruning: the cheapest parts go, what stays is refitted, and the least useful layer is found."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch

from serve.compression.memory import TensorPeak
from serve.compression.methods.gptq import layer_loss
from serve.compression.methods.structured import block_influence, choose_parts, part_columns, refit
from serve.errors import CompressionError


def _random(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def _gram(columns: int, tokens: int = 500, seed: int = 1) -> torch.Tensor:
    mixing = torch.eye(columns) + 0.3 * _random(columns, columns, seed + 1)
    x = _random(tokens, columns, seed) @ mixing * torch.exp(_random(1, columns, seed + 2))
    return x.t() @ x / tokens


def _loss(weight: torch.Tensor, gram: torch.Tensor, columns: torch.Tensor) -> float:
    """Of the refitted rest, by float64 least squares on its own."""
    gram = gram.double()
    gram = gram + 1e-6 * gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)
    fitted = torch.linalg.solve(gram[columns][:, columns], gram[columns] @ weight.double().t()).t()
    whole = torch.zeros_like(weight, dtype=torch.float64)
    whole[:, columns] = fitted
    return layer_loss(whole - weight, gram)


@pytest.mark.parametrize(("parts", "width", "keep"), [(6, 1, 5), (6, 3, 5), (8, 2, 7)])
def test_the_part_removed_is_the_one_whose_loss_costs_least(parts: int, width: int, keep: int) -> None:
    weight, gram = _random(10, parts * width), _gram(parts * width)
    kept = choose_parts(weight, gram, width, keep, damping=1e-6)
    every = [torch.tensor(chosen) for chosen in combinations(range(parts), keep)]
    losses = [_loss(weight, gram, part_columns(chosen, width)) for chosen in every]
    assert _loss(weight, gram, part_columns(kept, width)) == pytest.approx(min(losses), rel=1e-4)


def test_removing_more_by_rounds_stays_near_the_best_of_all_choices() -> None:
    weight, gram = _random(12, 10), _gram(10)
    losses = [_loss(weight, gram, torch.tensor(chosen)) for chosen in combinations(range(10), 6)]
    ours = _loss(weight, gram, choose_parts(weight, gram, 1, 6, damping=1e-6))
    assert ours <= 1.3 * min(losses)
    assert ours < sorted(losses)[len(losses) // 20]


def test_of_parts_that_say_the_same_one_stays() -> None:
    x = _random(500, 12)
    x[:, 1] = x[:, 0]
    weight = torch.ones(4, 12)
    kept = choose_parts(weight, x.t() @ x / 500, 1, 11, damping=1e-4)
    assert len({0, 1} & set(kept.tolist())) == 1


@pytest.mark.parametrize("columns", [[0, 2, 5], [1], [0, 1, 2, 3, 4, 5]])
def test_the_refit_is_least_squares(columns: list[int]) -> None:
    x, weight = _random(300, 6), _random(4, 6, 2)
    fitted = refit(weight, x.t() @ x / 300, torch.tensor(columns), damping=1e-9)
    solution = torch.linalg.lstsq(x[:, columns].double(), x.double() @ weight.double().t()).solution.t()
    torch.testing.assert_close(fitted.double(), solution, atol=1e-4, rtol=1e-4)


def test_the_refit_beats_dropping_the_columns() -> None:
    weight, gram, kept = _random(16, 64), _gram(64), torch.arange(48)
    refitted, dropped = torch.zeros(16, 64), torch.zeros(16, 64)
    refitted[:, kept], dropped[:, kept] = refit(weight, gram, kept), weight[:, kept]
    assert layer_loss(refitted - weight, gram) < 0.8 * layer_loss(dropped - weight, gram)


def test_choosing_and_refitting_take_what_the_report_allows_for_factorizing() -> None:
    weight, gram = _random(256, 1536), _gram(1536)
    with TensorPeak() as choosing:
        kept = choose_parts(weight, gram, 1, 1152)
    with TensorPeak() as refitting:
        refit(weight, gram, kept)
    assert max(choosing.peak_bytes, refitting.peak_bytes) < 3 * gram.nbytes + 2 * weight.double().nbytes


def test_a_matrix_that_is_no_gram_matrix_is_refused_by_layer_name() -> None:
    gram = torch.eye(6)
    gram[0, 1] = gram[1, 0] = 5
    for attempt in (
        lambda: choose_parts(_random(4, 6), gram, 1, 3, name="layers.3.down_proj"),
        lambda: refit(_random(4, 6), gram, torch.arange(4), name="layers.3.down_proj"),
    ):
        with pytest.raises(CompressionError, match=r"layers\.3\.down_proj: the Gram matrix"):
            attempt()


def test_columns_of_parts() -> None:
    assert part_columns(torch.tensor([0, 2]), 3).tolist() == [0, 1, 2, 6, 7, 8]


@pytest.mark.parametrize("tokens", [0, 1, 5])
def test_little_or_no_calibration_gives_a_finite_choice(tokens: int) -> None:
    x, weight = _random(tokens, 24), torch.cat([_random(6, 24), torch.zeros(1, 24), torch.ones(1, 24)])
    gram = x.t() @ x / max(tokens, 1)
    kept = choose_parts(weight, gram, 4, 4)
    assert kept.tolist() == sorted(set(kept.tolist()))
    assert len(kept) == 4
    assert refit(weight, gram, part_columns(kept, 4)).isfinite().all()


def test_without_calibration_the_largest_weights_stay() -> None:
    weight = torch.ones(4, 6) * torch.tensor([3.0, 1.0, 5.0, 0.1, 4.0, 2.0])
    assert choose_parts(weight, torch.zeros(6, 6), 1, 3).tolist() == [0, 2, 4]


def test_senseless_requests_and_numbers_are_refused_by_layer_name() -> None:
    weight, gram = _random(4, 12), _gram(12)
    for width, keep in ((5, 1), (4, 0), (4, 4)):
        with pytest.raises(CompressionError, match=r"layers\.3\.down_proj"):
            choose_parts(weight, gram, width, keep, name="layers.3.down_proj")
    weight[0, 0] = float("nan")
    with pytest.raises(CompressionError, match=r"layers\.3\.down_proj"):
        choose_parts(weight, gram, 4, 2, name="layers.3.down_proj")


def test_block_influence_is_the_angle_a_layer_turns() -> None:
    before = torch.tensor([[1.0, 0.0], [1.0, 1.0], [2.0, 0.0], [0.0, 0.0], [0.0, 0.0]])
    after = torch.tensor([[3.0, 0.0], [1.0, -1.0], [-1.0, 0.0], [0.0, 0.0], [1.0, 0.0]])
    torch.testing.assert_close(block_influence(before, after), torch.tensor([0.0, 1.0, 2.0, 0.0, 1.0]))
    assert block_influence(before[None], after[None]).shape == (5,)
