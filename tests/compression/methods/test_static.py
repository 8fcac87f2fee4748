"""Static INT8: one calibrated scale per layer, kernel and reference alike, and smoothing where it can be absorbed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from serve.compression.calibration import Calibration
from serve.compression.formats import LinearSpec
from serve.compression.method import Group, InputStatistics, Projection
from serve.compression.methods.static import Int8StaticMethod
from serve.compression.recipe import Recipe
from serve.compression.stages import Int8Static
from serve.errors import CompressionError
from serve.loading import load


class Absorbing:
    """A producer that remembers what was folded into it."""

    channels = 64
    scale = torch.ones(64)

    def spread(self, scale: Tensor) -> Tensor:
        return scale

    def divide(self, scale: Tensor) -> None:
        self.scale = scale


def statistics_of(x: Tensor) -> InputStatistics:
    return InputStatistics(x.shape[0], x.abs().mean(0), x.abs().amax(0), x.square().mean(0))


def projection(dtype: torch.dtype = torch.float32) -> Projection:
    generator = torch.Generator().manual_seed(0)
    spec = LinearSpec("layer", 64, 48, False, dtype)
    return Projection(spec, torch.randn(48, 64, generator=generator))


def inputs(outlier: float = 1.0) -> Tensor:
    x = torch.randn(200, 64, generator=torch.Generator().manual_seed(1))
    x[:, 3] *= outlier
    return x


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_kernel_is_bit_identical_to_its_reference_whatever_the_batch(dtype: torch.dtype) -> None:
    x = inputs().to(dtype)
    method, statistics = Int8StaticMethod(Int8Static()), statistics_of(x.float())
    made = [method.quantize(Group([projection(dtype)]), statistics)[0] for _ in range(2)]
    made[0].prepare()
    together = made[0](x)
    assert torch.equal(together, made[1].reference(x))
    assert torch.equal(together, torch.cat([made[0](rows) for rows in x.split(3)]))


def test_what_lies_beyond_the_calibrated_range_is_cut_off() -> None:
    x = inputs()
    layer = Int8StaticMethod(Int8Static()).quantize(Group([projection()]), statistics_of(x))[0]
    far = torch.full((1, 64), 1e6)
    limit = torch.full((1, 64), x.abs().amax().item())
    torch.testing.assert_close(layer.reference(far), layer.reference(limit))


def test_a_broken_token_breaks_its_own_output_only() -> None:
    x = inputs()[:3]
    layer = Int8StaticMethod(Int8Static()).quantize(Group([projection()]), statistics_of(x))[0]
    layer.prepare()
    clean = layer(x)
    broken = x.clone()
    broken[1, 5] = float("nan")
    found = layer(broken)
    assert found[1].isnan().all()
    assert torch.equal(found[::2], clean[::2])


def test_smoothing_rescues_a_loud_channel_from_the_others() -> None:
    x = inputs(outlier=100.0)
    exact = x @ projection().weight.t()
    errors = {}
    for alpha in (0.0, 0.5):
        producer = Absorbing()
        group = Group([projection()], producer)
        layer = Int8StaticMethod(Int8Static(smooth=alpha)).quantize(group, statistics_of(x))[0]
        errors[alpha] = (layer.reference(x / producer.scale) - exact).square().mean()
    assert errors[0.5] < errors[0.0] / 4


def test_inputs_that_were_never_seen_or_are_not_finite_name_the_layer() -> None:
    method = Int8StaticMethod(Int8Static())
    with pytest.raises(CompressionError, match="layer: calibration never reached"):
        method.quantize(Group([projection()]), None)
    with pytest.raises(CompressionError, match="layer: its calibration inputs"):
        method.quantize(Group([projection()]), statistics_of(inputs() * float("inf")))


def test_a_static_model_answers_nearly_as_its_reference(shared: Path) -> None:
    source = str(shared / "models" / "TinyStories-656K")
    calibration = Calibration(shared / "data" / "tinystories" / "calib.jsonl", num_samples=16)
    ids = torch.arange(3, 120)[None]
    with torch.no_grad():
        p = load(source, Recipe.parse("fp32")).model(ids).logits.log_softmax(-1)
        found = load(source, Recipe.parse("int8-static"), calibration=calibration)
        q = found.model(ids).logits.float().log_softmax(-1)
    assert (p.exp() * (p - q)).sum(-1).mean() < 0.03
    assert found.report.precision == "int8-static"
