"""FP8: the stored numbers are the nearest of the format, and hardware without its product is refused by name.

The CUDA kernel is compared with the reference where there is such a device (marked `gpu`).
"""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from serve.compression.formats import LinearSpec
from serve.compression.formats.fp8 import Fp8Linear, multiplies_fp8, quantize_rows_fp8
from serve.compression.method import Group, Projection
from serve.compression.methods.rounding import Fp8Method
from serve.compression.recipe import Recipe
from serve.compression.stages import Fp8
from serve.errors import UnsupportedHardware
from serve.loading import load

SHAPES = [(64, 64), (50, 33), (128, 200)]


def weights(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def layer(shape: tuple[int, int], dtype: torch.dtype = torch.float32) -> Fp8Linear:
    spec = LinearSpec("layer", shape[1], shape[0], True, dtype)
    made = Fp8Method(Fp8()).quantize(
        Group([Projection(spec, weights(*shape), weights(1, shape[0])[0].to(dtype))]), None
    )
    assert isinstance(made[0], Fp8Linear)
    return made[0]


def nearest(value: float) -> float:
    """To e4m3 by its definition: exponents -6 to 8, three bits of mantissa, ties to even, subnormals below."""
    if value == 0:
        return 0.0
    exponent = max(-6, math.floor(math.log2(abs(value))))
    step = 2.0 ** (exponent - 3)
    return math.copysign(min(round(abs(value) / step) * step, 448.0), value)


@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_rows_are_rounded_to_the_nearest_number_of_the_format(rows: int, columns: int) -> None:
    weight = weights(rows, columns) * torch.exp(3 * weights(rows, 1, 1))
    stored, scale = quantize_rows_fp8(weight)
    for row in range(0, rows, 7):
        step = weight[row].double().abs().max().item() / 448
        assert scale[row].item() == pytest.approx(step, rel=1e-6)
        exact = [nearest(value / scale[row].item()) for value in weight[row].tolist()]
        assert stored[row].float().tolist() == pytest.approx(exact, rel=0.07)  # float32's quotient may tip a tie
        assert sum(a == b for a, b in zip(stored[row].float().tolist(), exact, strict=True)) >= columns - 2


def test_zero_rows_stay_zero_and_constant_rows_are_exact() -> None:
    weight = torch.stack([torch.zeros(32), torch.full((32,), 0.7), torch.full((32,), -3e-5)])
    stored, scale = quantize_rows_fp8(weight)
    torch.testing.assert_close(stored.float() * scale[:, None], weight, rtol=1e-6, atol=0)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_product_is_that_of_a_float64_reference(shape: tuple[int, int]) -> None:
    made, x = layer(shape), weights(9, shape[1], 3)
    tokens, scale = quantize_rows_fp8(x)
    expected = tokens.double() * scale.double()[:, None] @ made.dequantize().double().t() + made.bias.double()
    torch.testing.assert_close(made(x).double(), expected, rtol=1e-5, atol=1e-5)
    exact = x.double() @ weights(*shape).double().t() + made.bias.double()
    assert (made(x) - exact).square().mean() < 2e-3 * exact.square().mean()


def test_an_answer_does_not_depend_on_its_neighbours_and_a_broken_token_breaks_only_its_own() -> None:
    made, x = layer((48, 64)), weights(6, 64, 2)
    assert torch.equal(made(x), torch.cat([made(rows) for rows in x.split(1)]))
    broken = x.clone()
    broken[2, 3] = float("inf")
    assert made(broken)[2].isnan().all()
    assert torch.equal(made(broken)[3:], made(x)[3:])


def test_it_is_saved_and_filled_as_it_is(tmp_path: Path) -> None:
    made = layer((50, 33), torch.bfloat16)
    save_file(dict(made.state_dict()), tmp_path / "layer.safetensors")
    again = Fp8Linear(made.spec)
    again.fill(**load_file(tmp_path / "layer.safetensors"))
    again.prepare()
    x = weights(4, 33).bfloat16()
    assert torch.equal(again(x), made.reference(x))
    assert made.storage().weight_bytes == 50 * 33


def test_a_cpu_is_refused_with_the_reason_and_a_recipe_that_works(shared: Path) -> None:
    with pytest.raises(UnsupportedHardware, match=r"fp8: a CPU has no product of 8-bit floats.*use int8"):
        load(str(shared / "models" / "TinyStories-656K"), Recipe.parse("fp8"), device="cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_kernel_agrees_with_its_reference(shape: tuple[int, int], dtype: torch.dtype) -> None:
    if not torch.cuda.is_available() or not multiplies_fp8(torch.device("cuda")):
        pytest.skip("no CUDA device with a product of 8-bit floats")
    plain, made = layer(shape, dtype).cuda(), layer(shape, dtype).cuda()
    made.prepare()
    for tokens in (1, 7, 64):
        x = weights(tokens, shape[1], tokens).to("cuda", dtype)
        torch.testing.assert_close(made(x).float(), plain.reference(x).float(), rtol=2e-2, atol=5e-2)
