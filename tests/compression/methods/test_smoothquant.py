"""SmoothQuant: the paper's factors, the same product, an easier input."""

from __future__ import annotations

import pytest
import torch

from serve.compression.methods.smoothquant import smooth_scales
from serve.errors import CompressionError


def _random(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 1.0])
def test_factors_are_the_papers(alpha: float) -> None:
    weights, loud = [_random(16, 30), _random(8, 30, 1)], _random(1, 30, 2)[0].abs() + 0.1
    scale = smooth_scales(weights, loud, alpha)
    for k in range(30):
        largest = max(weight[:, k].double().abs().max().item() for weight in weights)
        assert scale[k].item() == pytest.approx(loud[k].item() ** alpha / largest ** (1 - alpha), rel=1e-5)


def test_the_product_stays_and_eight_bits_per_tensor_hurt_less() -> None:
    x, weight = _random(200, 64), _random(32, 64, 1)
    x[:, 5] *= 100
    scale = smooth_scales([weight], x.abs().amax(0))
    torch.testing.assert_close((x / scale) @ (weight * scale).t(), x @ weight.t(), rtol=1e-4, atol=1e-3)

    def rounded(matrix: torch.Tensor, largest: torch.Tensor) -> torch.Tensor:
        step = largest / 127
        return (matrix / step).round() * step

    def error(x: torch.Tensor, weight: torch.Tensor, truth: torch.Tensor) -> float:
        low = rounded(x, x.abs().max()) @ rounded(weight, weight.abs().amax(1, keepdim=True)).t()
        return (low - truth).square().mean().item()

    assert error(x / scale, weight * scale, x @ weight.t()) < 0.2 * error(x, weight, x @ weight.t())


def test_inputs_that_share_a_channel_share_the_largest() -> None:
    weight, loud = _random(4, 8), torch.arange(1.0, 9.0)
    scale = smooth_scales([weight], loud, channel=torch.arange(8) % 4)
    largest = weight.abs().amax(0).view(2, 4).amax(0)
    torch.testing.assert_close(scale, (loud.view(2, 4).amax(0) / largest).sqrt())


def test_silent_channels_and_empty_columns_keep_a_factor_of_one() -> None:
    weight, loud = _random(4, 8), torch.ones(8)
    weight[:, 2], loud[5] = 0, 0
    scale = smooth_scales([weight], loud)
    assert scale[2] == scale[5] == 1
    assert scale.isfinite().all()


def test_numbers_that_are_not_finite_are_refused_by_layer_name() -> None:
    weight, loud = _random(4, 8), torch.ones(8)
    loud[3] = float("inf")
    with pytest.raises(CompressionError, match=r"layers\.3\.up_proj"):
        smooth_scales([weight], loud, name="layers.3.up_proj")
    weight[1, 1] = float("nan")
    with pytest.raises(CompressionError, match=r"layers\.3\.up_proj"):
        smooth_scales([weight], torch.ones(8), name="layers.3.up_proj")
