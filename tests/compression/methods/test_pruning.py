"""Pruning: the count is exact, the choice is the paper's, and what stays makes up for what goes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from serve.compression.formats.integer_grid import IntegerGrid
from serve.compression.methods.gptq import gptq, layer_loss
from serve.compression.methods.magnitude import Pattern, keep_largest, magnitude_mask
from serve.compression.methods.sparsegpt import sparsegpt
from serve.compression.methods.wanda import wanda_mask
from serve.errors import CompressionError


def _random(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def _gram(columns: int, tokens: int = 500, seed: int = 1) -> torch.Tensor:
    mixing = torch.eye(columns) + 0.3 * _random(columns, columns, seed + 1)
    x = _random(tokens, columns, seed) @ mixing * torch.exp(_random(1, columns, seed + 2))
    return x.t() @ x / tokens


@given(
    rows=st.integers(1, 5),
    columns=st.integers(1, 30),
    sparsity=st.floats(0.01, 0.99),
    levels=st.integers(1, 4),
    seed=st.integers(0, 99),
)
@settings(max_examples=60, deadline=None)
def test_exactly_the_share_goes_and_nothing_larger_than_what_stays(
    rows: int, columns: int, sparsity: float, levels: int, seed: int
) -> None:
    score = torch.randint(0, levels, (rows, columns), generator=torch.Generator().manual_seed(seed)).float()
    mask = keep_largest(score, sparsity)
    assert (mask.sum(1) == columns - round(columns * sparsity)).all()
    for row, keep in zip(score, mask, strict=True):
        if keep.any() and not keep.all():
            assert row[keep].min() >= row[~keep].max()


@pytest.mark.parametrize("columns", [4, 8, 30, 7, 3, 1])
def test_two_of_every_four_stay(columns: int) -> None:
    mask = keep_largest(_random(6, columns).abs(), 0.5, "2:4")
    for start in range(0, columns, 4):
        part = mask[:, start : start + 4]
        assert (part.sum(1) == -(-part.shape[1] // 2)).all()


def test_magnitude_compares_over_the_whole_matrix() -> None:
    weight = torch.tensor([[5.0, -6.0, 7.0, 8.0], [1.0, 2.0, -3.0, 0.0]])
    assert magnitude_mask(weight, 0.5).tolist() == [[True] * 4, [False] * 4]
    assert magnitude_mask(weight, 0.5, "2:4").sum(1).tolist() == [2, 2]


def test_wanda_compares_within_a_row_and_weighs_by_the_inputs() -> None:
    weight = torch.tensor([[1.0, 2.0, 3.0, 4.0], [-9.0, 8.0, 7.0, 6.0]])
    mask = wanda_mask(weight, torch.tensor([100.0, 1.0, 1.0, 0.01]), 0.5)
    assert mask.tolist() == [[True, False, True, False], [True, True, False, False]]


def _best(scores: list[float], count: int) -> torch.Tensor:
    """True for the `count` largest, and among equal ones the first."""
    chosen = sorted(range(len(scores)), key=lambda k: -scores[k])[:count]
    return torch.tensor([k in chosen for k in range(len(scores))])


def _sparsegpt_reference(
    weight: torch.Tensor, gram: torch.Tensor, sparsity: float, pattern: Pattern
) -> tuple[torch.Tensor, torch.Tensor]:
    """SparseGPT in float64, inverting what is left of H at every column."""
    weight, hessian = weight.double().clone(), gram.double()
    width = weight.shape[1]
    hessian = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(width, dtype=torch.float64)
    inverses = [torch.linalg.inv(hessian[j:, j:]) for j in range(width)]
    diagonal = torch.stack([inverse[0, 0] for inverse in inverses])
    kept = torch.ones_like(weight, dtype=torch.bool)
    for j in range(width):
        if pattern and j % 4 == 0:
            score = weight[:, j : j + 4] ** 2 / diagonal[j : j + 4]
            for row, scores in enumerate(score.tolist()):
                kept[row, j : j + 4] = _best(scores, -(-len(scores) // 2))
        elif not pattern and j % 128 == 0:
            score = weight[:, j : j + 128] ** 2 / diagonal[j : j + 128]
            # Transposed as there, for equal scores; which stays is otherwise free.
            count = score.numel() - round(score.numel() * sparsity)
            kept[:, j : j + 128] = _best(score.t().flatten().tolist(), count).view(-1, weight.shape[0]).t()
        pruned = weight[:, j] * kept[:, j]
        weight[:, j:] -= ((weight[:, j] - pruned) / inverses[j][0, 0])[:, None] * inverses[j][0]
        weight[:, j] = pruned
    return weight, kept


@pytest.mark.parametrize("pattern", ["", "2:4"], ids=["unstructured", "2:4"])
@pytest.mark.parametrize(("rows", "columns"), [(8, 64), (5, 30), (3, 17), (4, 200)])
def test_sparsegpt_equals_the_float64_reference(rows: int, columns: int, pattern: Pattern) -> None:
    weight, gram = _random(rows, columns), _gram(columns)
    ours, kept = sparsegpt(weight, gram, 0.5, pattern)
    reference, reference_kept = _sparsegpt_reference(weight, gram, 0.5, pattern)
    assert torch.equal(kept, reference_kept)
    torch.testing.assert_close(ours.double(), reference, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("pattern", ["", "2:4"], ids=["unstructured", "2:4"])
def test_sparsegpt_loses_less_than_wanda_and_wanda_less_than_magnitude(pattern: Pattern) -> None:
    weight, gram = _random(32, 128), _gram(128)
    sparse, kept = sparsegpt(weight, gram, 0.5, pattern)
    assert (sparse[~kept] == 0).all()
    assert kept.float().mean() == pytest.approx(0.5, abs=0.01)
    ours = layer_loss(sparse - weight, gram)
    wanda = layer_loss(weight * wanda_mask(weight, gram.diagonal(), 0.5, pattern) - weight, gram)
    magnitude = layer_loss(weight * magnitude_mask(weight, 0.5, pattern) - weight, gram)
    assert ours < wanda < magnitude


def test_the_mask_survives_the_quantizer_that_follows() -> None:
    weight, gram = _random(16, 64), _gram(64)
    sparse, kept = sparsegpt(weight, gram, 0.5, "2:4")
    quantized = gptq(sparse, gram, IntegerGrid(4, 32), mask=kept).dequantize()
    assert (quantized[~kept] == 0).all()


@pytest.mark.parametrize("pattern", ["", "2:4"], ids=["unstructured", "2:4"])
@pytest.mark.parametrize("tokens", [0, 1, 20])
def test_little_or_no_calibration_gives_a_finite_result(tokens: int, pattern: Pattern) -> None:
    x = _random(tokens, 64)
    gram = x.t() @ x / max(tokens, 1)
    weight = torch.cat([_random(8, 64), torch.zeros(1, 64), torch.ones(1, 64)])
    sparse, kept = sparsegpt(weight, gram, 0.5, pattern)
    assert sparse.isfinite().all()
    assert kept.float().mean() == pytest.approx(0.5)
    assert (wanda_mask(weight, gram.diagonal(), 0.5, pattern).float().mean(1) == 0.5).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_are_refused_by_layer_name(value: float) -> None:
    weight, gram, broken = _random(4, 16), _gram(16), _random(4, 16)
    broken[1, 1] = value
    loud = gram.clone()
    loud[3, 3] = value
    for attempt in (
        lambda: magnitude_mask(broken, 0.5, name="layers.3.o_proj"),
        lambda: wanda_mask(broken, gram.diagonal(), 0.5, name="layers.3.o_proj"),
        lambda: wanda_mask(weight, loud.diagonal(), 0.5, name="layers.3.o_proj"),
        lambda: sparsegpt(broken, gram, 0.5, name="layers.3.o_proj"),
        lambda: sparsegpt(weight, loud, 0.5, name="layers.3.o_proj"),
    ):
        with pytest.raises(CompressionError, match=r"layers\.3\.o_proj"):
            attempt()
