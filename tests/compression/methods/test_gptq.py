"""GPTQ: what the paper says, computed twice; and every odd matrix gives a finite result or a named error."""

from __future__ import annotations

import pytest
import torch

from serve.compression.formats.integer_grid import GroupedWeight, IntegerGrid
from serve.compression.methods.gptq import gptq, inverse_factor, layer_loss
from serve.compression.methods.rtn import round_to_nearest
from serve.errors import CompressionError

SHAPES = [(8, 64, 32), (5, 30, 8), (6, 100, 64), (3, 17, -1), (4, 150, 16), (2, 300, -1)]


def _random(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def _gram(columns: int, tokens: int = 500, seed: int = 1) -> torch.Tensor:
    """Of correlated inputs, some channels much larger than others."""
    mixing = torch.eye(columns) + 0.3 * _random(columns, columns, seed + 1)
    x = _random(tokens, columns, seed) @ mixing * torch.exp(_random(1, columns, seed + 2))
    return x.t() @ x / tokens


def _reference(weight: torch.Tensor, gram: torch.Tensor, grid: IntegerGrid, damping: float) -> torch.Tensor:
    """The paper's algorithm in float64 by its definition: after each column, invert what is left of H again."""
    weight, hessian = weight.double().clone(), gram.double()
    hessian = hessian + damping * hessian.diagonal().mean() * torch.eye(len(hessian), dtype=torch.float64)
    columns = grid.columns_per_group(weight.shape[1])
    for j in range(weight.shape[1]):
        if j % columns == 0:
            part = weight[:, j : j + columns]
            scale = part.abs().amax(1) / ((grid.levels - 1) / 2)
            zero = torch.full_like(scale, grid.middle)
            if not grid.symmetric:
                low, high = part.amin(1).clamp_max(0), part.amax(1).clamp_min(0)
                scale = (high - low) / (grid.levels - 1)
                zero = (-low / scale).round()
        rounded = ((weight[:, j] / scale + zero).round().clamp(0, grid.levels - 1) - zero) * scale
        inverse = torch.linalg.inv(hessian[j:, j:])
        weight[:, j:] -= ((weight[:, j] - rounded) / inverse[0, 0])[:, None] * inverse[0]
        weight[:, j] = rounded
    return weight


@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(("rows", "columns", "group_size"), SHAPES)
def test_plain_gptq_equals_the_float64_reference(
    rows: int, columns: int, group_size: int, bits: int, symmetric: bool
) -> None:
    weight, gram, grid = _random(rows, columns), _gram(columns), IntegerGrid(bits, group_size, symmetric)
    ours = gptq(weight, gram, grid, candidates=1, sweeps=0, damping=0.01).dequantize(torch.float64)
    reference = _reference(weight, gram, grid, 0.01)
    # A weight within rounding noise of the middle between two points may go either way, and its row then differs.
    same_rows = ((ours - reference).abs().amax(1) < 1e-4).double().mean()
    assert same_rows >= 0.75
    assert layer_loss(ours - weight, gram) == pytest.approx(layer_loss(reference - weight, gram), rel=0.05)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_it_beats_rounding_to_nearest(bits: int) -> None:
    weight, gram, grid = _random(16, 128), _gram(128), IntegerGrid(bits, 32)
    nearest = layer_loss(round_to_nearest(weight, grid).dequantize() - weight, gram)
    assert layer_loss(gptq(weight, gram, grid).dequantize() - weight, gram) < 0.8 * nearest


@pytest.mark.parametrize("order", [False, True], ids=["natural", "activation"])
@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
def test_each_refinement_lowers_the_loss(symmetric: bool, order: bool) -> None:
    weight, gram, grid = _random(64, 128), _gram(128), IntegerGrid(4, 32, symmetric)

    def loss(candidates: int, sweeps: int) -> float:
        rounded = gptq(weight, gram, grid, candidates=candidates, sweeps=sweeps, activation_order=order)
        return layer_loss(rounded.dequantize() - weight, gram)

    assert loss(6, 0) < loss(1, 0)
    assert loss(6, 1) < loss(6, 0)
    assert loss(6, 3) <= loss(6, 1)


def test_no_single_code_can_be_improved_once_the_sweeps_settle() -> None:
    weight, gram, grid = _random(4, 24), _gram(24), IntegerGrid(3, 8)
    settled = gptq(weight, gram, grid, sweeps=100)
    best = layer_loss(settled.dequantize() - weight, gram)
    for n, k, step in [(n, k, step) for n in range(4) for k in range(24) for step in (-1, 1)]:
        code = int(settled.codes[n, k]) + step
        if 0 <= code < grid.levels:
            codes = settled.codes.clone()
            codes[n, k] = code
            moved = GroupedWeight(grid, codes, settled.scales).dequantize()
            assert layer_loss(moved - weight, gram) >= best * (1 - 1e-5)


@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize(("rows", "columns", "group_size"), SHAPES)
def test_activation_order_groups_columns_by_size_and_remembers_where_they_were(
    rows: int, columns: int, group_size: int, symmetric: bool
) -> None:
    weight, gram, grid = _random(rows, columns), _gram(columns), IntegerGrid(4, group_size, symmetric)
    rounded = gptq(weight, gram, grid, activation_order=True)
    assert rounded.permutation is not None
    diagonal = gram.diagonal()[rounded.permutation]
    assert (diagonal[:-1] >= diagonal[1:]).all()
    nearest = layer_loss(round_to_nearest(weight, grid).dequantize() - weight, gram)
    assert layer_loss(rounded.dequantize() - weight, gram) < nearest


@pytest.mark.parametrize("order", [False, True], ids=["natural", "activation"])
@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
def test_a_pruning_mask_survives(symmetric: bool, order: bool) -> None:
    weight, gram = _random(16, 96), _gram(96)
    mask = _random(16, 96, seed=9) > 0
    rounded = gptq(weight * mask, gram, IntegerGrid(4, 32, symmetric), mask=mask, activation_order=order).dequantize()
    assert (rounded[~mask] == 0).all()
    assert (rounded[mask] != 0).float().mean() > 0.8


def test_what_calibration_never_saw_is_rounded_to_nearest() -> None:
    weight, grid = _random(8, 64), IntegerGrid(4, 32)
    unseen = gptq(weight, torch.zeros(64, 64), grid, candidates=1)
    assert torch.equal(unseen.codes, round_to_nearest(weight, grid).codes)


def test_a_dead_input_channel_does_not_disturb_the_others() -> None:
    weight, gram, grid = _random(8, 64), _gram(64), IntegerGrid(4, 32)
    gram[:, 10], gram[10] = 0, 0
    rounded = gptq(weight, gram, grid)
    assert rounded.dequantize().isfinite().all()
    without = [k for k in range(64) if k != 10]
    error = (rounded.dequantize() - weight)[:, without]
    nearest = (round_to_nearest(weight, grid).dequantize() - weight)[:, without]
    live = gram[without][:, without]
    assert layer_loss(error, live) < layer_loss(nearest, live)


@pytest.mark.parametrize("tokens", [1, 5, 63])
def test_fewer_tokens_than_columns_still_give_a_good_result(tokens: int) -> None:
    x = _random(tokens, 128)
    gram, weight, grid = x.t() @ x / tokens, _random(16, 128), IntegerGrid(4, 32)
    rounded = gptq(weight, gram, grid).dequantize()
    assert rounded.isfinite().all()
    assert layer_loss(rounded - weight, gram) < layer_loss(round_to_nearest(weight, grid).dequantize() - weight, gram)


def test_all_zero_and_constant_rows_come_out_finite_and_near() -> None:
    weight = torch.stack([torch.zeros(64), torch.full((64,), 0.7), _random(1, 64)[0]])
    rounded = gptq(weight, _gram(64), IntegerGrid(4, 32)).dequantize()
    assert torch.equal(rounded[0], torch.zeros(64))
    torch.testing.assert_close(rounded[1], weight[1], atol=1e-3, rtol=0)


def test_constant_inputs_give_a_gram_matrix_of_rank_one_and_a_finite_result() -> None:
    assert gptq(_random(8, 64), torch.ones(64, 64), IntegerGrid(4, 32)).dequantize().isfinite().all()


def test_the_factor_is_that_of_the_damped_inverse() -> None:
    gram = _gram(40).double()
    factor = inverse_factor(gram, 0.01).double()
    damped = gram + 0.01 * gram.diagonal().mean() * torch.eye(40, dtype=torch.float64)
    torch.testing.assert_close(factor.t() @ factor @ damped, torch.eye(40, dtype=torch.float64), atol=1e-3, rtol=0)
    assert torch.equal(factor, factor.triu())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_are_refused_by_layer_name(value: float) -> None:
    weight, gram = _random(4, 16), _gram(16)
    broken = weight.clone()
    broken[0, 0] = value
    with pytest.raises(CompressionError, match=r"layers\.3\.o_proj.*weights"):
        gptq(broken, gram, IntegerGrid(4, 8), name="layers.3.o_proj")
    gram[3, 3] = value
    with pytest.raises(CompressionError, match=r"layers\.3\.o_proj.*calibration"):
        gptq(weight, gram, IntegerGrid(4, 8), name="layers.3.o_proj")


def test_a_gram_matrix_that_is_not_one_is_refused() -> None:
    with pytest.raises(CompressionError, match="not positive"):
        inverse_factor(torch.tensor([[1.0, 5.0], [5.0, 1.0]]), 0.01)


def test_the_same_input_gives_the_same_codes() -> None:
    weight, gram = _random(16, 96), _gram(96)
    first, second = (gptq(weight, gram, IntegerGrid(4, 32)) for _ in range(2))
    assert torch.equal(first.codes, second.codes)
    assert torch.equal(first.scales, second.scales)
