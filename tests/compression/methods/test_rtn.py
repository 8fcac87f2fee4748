"""Rounding to nearest: on the grid, nearest, and unshaken by odd rows."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from serve.compression.formats.integer_grid import GroupedWeight, IntegerGrid
from serve.compression.methods.rtn import absmax_scales, round_to_nearest
from serve.errors import CompressionError


def _random(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def _reference(weight: torch.Tensor, grid: IntegerGrid) -> torch.Tensor:
    """Absmax rounding written out in float64, one group at a time."""
    weight, columns = weight.double(), grid.columns_per_group(weight.shape[1])
    rounded = torch.zeros_like(weight)
    for n in range(weight.shape[0]):
        for start in range(0, weight.shape[1], columns):
            part = weight[n, start : start + columns]
            if grid.symmetric:
                scale, zero = part.abs().max() / ((grid.levels - 1) / 2), torch.tensor(float(grid.middle))
            else:
                low, high = part.min().clamp_max(0), part.max().clamp_min(0)
                scale = (high - low) / (grid.levels - 1)
                zero = (-low / scale).round()
            codes = (part / scale + zero).round().clamp(0, grid.levels - 1)
            rounded[n, start : start + columns] = (codes - zero) * scale
    return rounded


@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(
    ("rows", "columns", "group_size"), [(8, 64, 32), (5, 30, 8), (3, 7, -1), (4, 100, 64), (2, 12, 5)]
)
def test_rounding_equals_the_float64_reference(
    rows: int, columns: int, group_size: int, bits: int, symmetric: bool
) -> None:
    weight, grid = _random(rows, columns), IntegerGrid(bits, group_size, symmetric)
    rounded = round_to_nearest(weight, grid).dequantize(torch.float64)
    # Distances, not values: the largest weight lies right between two points of the plain symmetric grid.
    distance = (_reference(weight, grid) - weight).abs()
    torch.testing.assert_close((rounded - weight).abs(), distance, rtol=1e-5, atol=1e-6)


@given(seed=st.integers(0, 10_000), bits=st.sampled_from([2, 3, 4, 8]), symmetric=st.booleans())
@settings(max_examples=40, deadline=None)
def test_no_point_of_the_grid_is_nearer(seed: int, bits: int, symmetric: bool) -> None:
    weight, grid = _random(4, 24, seed), IntegerGrid(bits, 8, symmetric)
    rounded = round_to_nearest(weight, grid, candidates=5)
    index = grid.group_index(24)
    zero = 2.0 ** (bits - 1) if rounded.zero_points is None else rounded.zero_points.double().t()[:, index, None]
    points = (torch.arange(grid.levels).double() - zero) * rounded.scales.double().t()[:, index, None]
    nearest = (points - weight[..., None]).abs().amin(-1)
    torch.testing.assert_close((rounded.dequantize(torch.float64) - weight).abs(), nearest, atol=1e-6, rtol=0)


@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_searching_scales_never_costs(bits: int, symmetric: bool) -> None:
    weight, grid = _random(16, 128), IntegerGrid(bits, 32, symmetric)

    def loss(rounded: GroupedWeight) -> torch.Tensor:
        return (rounded.dequantize() - weight).square().view(16, 4, 32).sum(-1)

    searched, plain = loss(round_to_nearest(weight, grid, candidates=8)), loss(round_to_nearest(weight, grid))
    assert (searched <= plain * (1 + 1e-5)).all()
    assert searched.sum() < plain.sum()


def test_loud_inputs_decide_where_the_error_goes() -> None:
    weight, grid = _random(32, 64), IntegerGrid(2, 64)
    gram = torch.diag(torch.cat([torch.full((8,), 100.0), torch.ones(56)]))
    weighted = round_to_nearest(weight, grid, candidates=12, gram=gram).dequantize() - weight
    plain = round_to_nearest(weight, grid, candidates=12).dequantize() - weight
    assert weighted[:, :8].square().sum() < plain[:, :8].square().sum()
    assert ((weighted @ gram) * weighted).sum() < ((plain @ gram) * plain).sum()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_scales_are_rounded_before_the_weights_are(dtype: torch.dtype) -> None:
    weight, grid = _random(8, 64), IntegerGrid(8, 32)
    rounded = round_to_nearest(weight, grid, dtype=dtype)
    assert rounded.scales.dtype == dtype
    assert torch.equal(absmax_scales(weight[:, :32], grid, dtype).scale, rounded.scales[0].float())
    assert ((rounded.dequantize() - weight).abs() <= 1.01 * rounded.scales.float().t()[:, grid.group_index(64)]).all()


@pytest.mark.parametrize("candidates", [1, 6])
@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
def test_all_zero_rows_are_exact_and_constant_rows_near(symmetric: bool, candidates: int) -> None:
    weight = torch.stack([torch.zeros(16), torch.full((16,), 0.7), torch.full((16,), -0.7)])
    rounded = round_to_nearest(weight, IntegerGrid(4, 16, symmetric), candidates=candidates).dequantize()
    assert torch.equal(rounded[0], torch.zeros(16))
    tolerance = 0.05 if symmetric and candidates == 1 else 1e-6  # the plain symmetric grid clips by half a step
    torch.testing.assert_close(rounded[1:], weight[1:], atol=tolerance, rtol=0)


@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
def test_zeros_stay_zeros(symmetric: bool) -> None:
    weight = _random(16, 64)
    weight[:, ::3] = 0
    rounded = round_to_nearest(weight, IntegerGrid(4, 32, symmetric), candidates=6).dequantize()
    assert (rounded[:, ::3] == 0).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_weight_that_is_not_finite_is_refused_by_layer_name(value: float) -> None:
    weight = _random(4, 8)
    weight[2, 3] = value
    with pytest.raises(CompressionError, match=r"layers\.3\.up_proj.*1 of 32"):
        round_to_nearest(weight, IntegerGrid(4, 8), name="layers.3.up_proj")
