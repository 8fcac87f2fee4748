"""AWQ: the loud channels are protected, and no scaling at all is always among what is tried."""

from __future__ import annotations

import pytest
import torch

from serve.compression.formats.integer_grid import IntegerGrid
from serve.compression.methods.awq import awq, search_scales
from serve.compression.methods.gptq import layer_loss
from serve.compression.methods.rtn import round_to_nearest
from serve.errors import CompressionError


def _random(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def _inputs(columns: int, *, loud: int = 4, factor: float = 30.0, tokens: int = 400) -> torch.Tensor:
    """Activations with a few planted outlier channels."""
    x = _random(tokens, columns, seed=1)
    x[:, 3 : 3 + loud] *= factor
    return x


def _losses(weight: torch.Tensor, x: torch.Tensor, grid: IntegerGrid, candidates: int = 1) -> tuple[float, float]:
    """Mean squared error of the outputs over the samples themselves: with AWQ, and rounded to nearest."""
    gram = x.t() @ x / len(x)
    scale = search_scales([weight], gram, x.abs().mean(0), grid)
    ours = awq(weight, gram, grid, scale, candidates=candidates).dequantize() / scale
    nearest = round_to_nearest(weight, grid).dequantize()
    return tuple((x.double() @ (new - weight).double().t()).square().mean().item() for new in (ours, nearest))


@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize(("columns", "group_size"), [(128, 64), (100, 32), (30, 8), (64, -1)])
def test_it_beats_rounding_to_nearest_where_channels_are_loud(columns: int, group_size: int, symmetric: bool) -> None:
    grid = IntegerGrid(4, group_size, symmetric)
    ours, nearest = _losses(_random(32, columns), _inputs(columns, loud=2), grid)
    assert ours < 0.9 * nearest


@pytest.mark.parametrize("candidates", [1, 8])
@pytest.mark.parametrize("seed", range(5))
def test_it_never_loses_to_rounding_where_no_channel_is_loud(seed: int, candidates: int) -> None:
    ours, nearest = _losses(_random(32, 96, seed), _random(400, 96, seed + 50), IntegerGrid(4, 32), candidates)
    assert ours <= nearest * (1 + 1e-6)


def test_the_loss_searched_is_that_of_a_float64_reference() -> None:
    """Among the published family of scales none is better on the samples than the one returned."""
    weight, x, grid = _random(16, 48), _inputs(48), IntegerGrid(4, 16)
    gram, loud = x.t() @ x / len(x), x.abs().mean(0)

    def error(scale: torch.Tensor) -> float:
        new = round_to_nearest(weight * scale, grid).dequantize().double() / scale
        return (x.double() @ (new - weight).t()).square().mean().item()

    best = error(search_scales([weight], gram, loud, grid))
    for alpha in torch.linspace(0, 1, 11).tolist():
        scale = loud**alpha
        assert best <= error(scale / (scale.max() * scale.min()).sqrt()) * (1 + 1e-6)


def test_loud_channels_get_the_larger_factors() -> None:
    x = _inputs(64)
    scale = search_scales([_random(32, 64)], x.t() @ x / len(x), x.abs().mean(0), IntegerGrid(4, 64))
    assert scale[3:7].min() > scale[10:].max()


def test_siblings_share_their_factors() -> None:
    x, grid = _inputs(64), IntegerGrid(4, 32)
    gram, loud, weights = x.t() @ x / len(x), x.abs().mean(0), [_random(32, 64), _random(8, 64, 5)]
    scale = search_scales(weights, gram, loud, grid)
    assert scale.shape == (64,)
    total = sum(layer_loss(awq(w, gram, grid, scale, candidates=1).dequantize() / scale - w, gram) for w in weights)
    plain = sum(layer_loss(round_to_nearest(w, grid).dequantize() - w, gram) for w in weights)
    assert total < plain


def test_inputs_that_share_a_channel_share_a_factor() -> None:
    x, channel = _inputs(64), torch.arange(64) % 16
    scale = search_scales([_random(32, 64)], x.t() @ x / len(x), x.abs().mean(0), IntegerGrid(4, 32), channel=channel)
    assert scale.shape == (16,)
    assert (scale > 0).all()


@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
def test_clipping_lowers_the_loss_further(symmetric: bool) -> None:
    weight, x, grid = _random(32, 128), _inputs(128), IntegerGrid(4, 64, symmetric)
    assert _losses(weight, x, grid, candidates=8)[0] < _losses(weight, x, grid, candidates=1)[0]


def test_silent_channels_and_empty_columns_keep_a_factor_of_one() -> None:
    x, weight = _inputs(64), _random(16, 64)
    x[:, 40], weight[:, 41] = 0, 0
    scale = search_scales([weight], x.t() @ x / len(x), x.abs().mean(0), IntegerGrid(4, 32))
    assert scale.isfinite().all()
    assert scale[40] == 1
    nothing = search_scales([weight], torch.zeros(64, 64), torch.zeros(64), IntegerGrid(4, 32))
    assert torch.equal(nothing, torch.ones(64))


def test_pruned_weights_stay_zero() -> None:
    x, weight = _inputs(64), _random(16, 64) * (_random(16, 64, 9) > 0)
    gram = x.t() @ x / len(x)
    scale = search_scales([weight], gram, x.abs().mean(0), IntegerGrid(4, 32, False))
    assert (awq(weight, gram, IntegerGrid(4, 32, False), scale).dequantize()[weight == 0] == 0).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_are_refused_by_layer_name(value: float) -> None:
    x, weight = _inputs(64), _random(16, 64)
    weight[0, 0] = value
    with pytest.raises(CompressionError, match=r"layers\.3\.o_proj"):
        search_scales([weight], x.t() @ x, x.abs().mean(0), IntegerGrid(4, 32), name="layers.3.o_proj")
    with pytest.raises(CompressionError, match=r"layers\.3\.o_proj"):
        awq(_random(16, 64), x.t() @ x * value, IntegerGrid(4, 32), name="layers.3.o_proj")
