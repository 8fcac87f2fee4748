"""The products against float64 arithmetic on the same stored numbers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from serve.compression.formats.packing import pack
from serve.kernels import PackedLinear

SHAPES = [(64, 128), (50, 100), (257, 320), (33, 31), (1, 64)]
ROWS = [1, 2, 7, 16, 17, 33, 70]


def activations(rows: int, inputs: int) -> Tensor:
    return torch.randn(rows, inputs, generator=torch.manual_seed(rows)).bfloat16()


def relative_error(y: Tensor, expected: Tensor) -> float:
    return float((y.double() - expected).norm() / expected.norm())


def bf16_case(outputs: int, inputs: int) -> tuple[PackedLinear, Tensor]:
    weight = torch.randn(outputs, inputs).bfloat16()
    return PackedLinear.bf16(weight), weight.double()


def code4_case(
    outputs: int, inputs: int, *, group: int = 32, asymmetric: bool, half: bool
) -> tuple[PackedLinear, Tensor]:
    groups = -(-inputs // group)
    codes = torch.randint(0, 16, (outputs, inputs), dtype=torch.uint8)
    scales = torch.rand(outputs, groups) + 0.5
    scales = scales.bfloat16() if half else scales
    zeros = torch.randint(0, 16, (outputs, groups)).to(scales.dtype) if asymmetric else None
    levels = torch.arange(16.0) - (0 if asymmetric else 8)
    by_input = torch.arange(inputs) // group
    values = levels.double()[codes.long()]
    if zeros is not None:
        values -= zeros.double()[:, by_input]
    return PackedLinear.code4(codes, scales, zeros, levels, group), values * scales.double()[:, by_input]


@pytest.mark.parametrize(("outputs", "inputs"), SHAPES)
@pytest.mark.parametrize("rows", ROWS)
def test_bf16_equals_the_exact_product_but_for_its_rounding(outputs: int, inputs: int, rows: int) -> None:
    packed, weight = bf16_case(outputs, inputs)
    x = activations(rows, inputs)
    assert relative_error(packed(x), x.double() @ weight.T) < 4e-3


@pytest.mark.parametrize(("outputs", "inputs"), SHAPES)
@pytest.mark.parametrize("rows", ROWS)
def test_int8_equals_the_product_of_the_rounded_numbers(outputs: int, inputs: int, rows: int) -> None:
    weight = torch.randint(-127, 128, (outputs, inputs), dtype=torch.int8)
    scale, bias = torch.rand(outputs) + 0.5, torch.randn(outputs)
    x = activations(rows, inputs)
    token_scale = x.float().abs().amax(1, keepdim=True) / 127
    rounded = (x.float() / token_scale).round().double()
    expected = rounded @ weight.double().T * token_scale.double() * scale.double() + bias.double()
    assert relative_error(PackedLinear.int8(weight, scale, bias)(x), expected) < 4e-3


@pytest.mark.parametrize(("outputs", "inputs"), SHAPES)
@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize("half", [False, True])
def test_codes_equal_the_product_of_their_values(outputs: int, inputs: int, asymmetric: bool, half: bool) -> None:
    packed, weight = code4_case(outputs, inputs, asymmetric=asymmetric, half=half)
    for rows in ROWS:
        x = activations(rows, inputs)
        assert relative_error(packed(x), x.double() @ weight.T) < 4e-3


@pytest.mark.parametrize("group", [32, 64, 128])
def test_groups_of_every_size_scale_their_own_inputs(group: int) -> None:
    packed, weight = code4_case(48, 320, group=group, asymmetric=True, half=True)
    x = activations(5, 320)
    assert relative_error(packed(x), x.double() @ weight.T) < 4e-3


@pytest.mark.parametrize(("outputs", "inputs"), [(64, 128), (50, 96), (257, 320), (31, 32), (96, 40)])
def test_codes_pack_alike_from_every_order_they_are_stored_in(outputs: int, inputs: int) -> None:
    codes = torch.randint(0, 16, (outputs, inputs), dtype=torch.uint8)
    scales, levels = torch.rand(outputs, -(-inputs // 32)) + 0.5, torch.arange(16.0) - 8
    x = activations(3, inputs)
    expected = PackedLinear.code4(codes, scales, None, levels, 32)(x)
    pairs = (codes.view(-1, 2)[:, 0] << 4) | codes.view(-1, 2)[:, 1]
    assert torch.equal(PackedLinear.code4(pairs, scales, None, levels, 32, inputs=inputs, order="pairs")(x), expected)
    blocks = pack(codes, 4)
    assert torch.equal(PackedLinear.code4(blocks, scales, None, levels, 32, inputs=inputs, order="blocks")(x), expected)


def test_a_row_never_depends_on_the_rows_beside_it() -> None:
    inputs = 320
    cases = [bf16_case(96, inputs)[0], code4_case(96, inputs, asymmetric=True, half=True)[0]]
    cases.append(PackedLinear.int8(torch.randint(-127, 128, (96, inputs), dtype=torch.int8), torch.rand(96)))
    x = activations(70, inputs)
    for packed in cases:
        alone = torch.cat([packed(row) for row in x.split(1)])
        assert torch.equal(packed(x), alone)
        assert torch.equal(packed(x[3:40]), alone[3:40])


def test_packing_loses_nothing() -> None:
    weight = torch.randn(50, 100).bfloat16()
    assert torch.equal(PackedLinear.bf16(weight).unpacked(), weight)
    whole = torch.randint(-127, 128, (50, 100), dtype=torch.int8)
    assert torch.equal(PackedLinear.int8(whole, torch.ones(50)).unpacked(), whole)


def test_all_zero_activations_give_zeros_and_not_nan() -> None:
    packed = PackedLinear.int8(torch.ones(32, 64, dtype=torch.int8), torch.ones(32))
    assert torch.equal(packed(torch.zeros(3, 64, dtype=torch.bfloat16)), torch.zeros(3, 32, dtype=torch.bfloat16))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_token_that_is_not_finite_shows_in_its_whole_output_and_in_no_other(bad: float) -> None:
    x = activations(3, 64)
    x[1, 5] = bad
    for packed in (
        PackedLinear.int8(torch.ones(40, 64, dtype=torch.int8), torch.ones(40)),
        PackedLinear.bf16(torch.ones(40, 64, dtype=torch.bfloat16)),
    ):
        y = packed(x)
        assert not y[1].isfinite().any()
        assert y[[0, 2]].isfinite().all()


def test_a_group_that_does_not_fill_tiles_is_refused() -> None:
    with pytest.raises(ValueError, match="whole tiles"):
        PackedLinear.code4(torch.zeros(8, 48, dtype=torch.uint8), torch.ones(8, 2), None, torch.arange(16.0), 24)
