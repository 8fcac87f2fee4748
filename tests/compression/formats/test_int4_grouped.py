"""The grouped integer format: every path multiplies by the same stored values as the plain reference."""

from __future__ import annotations

import pytest
import torch

from serve.compression.formats import grouped
from serve.compression.formats.grouped import KERNEL_BATCH, GroupedLinear
from serve.compression.formats.integer_grid import GroupedWeight, IntegerGrid
from serve.compression.formats.linear import LinearSpec
from serve.compression.formats.packing import kernel_block_rows, packed_shape

SHAPES = [(64, 128), (16, 32), (128, 384), (96, 200), (33, 100), (1, 17), (48, 96), (130, 256)]
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 1.5e-3}


def _weight(
    rows: int, columns: int, grid: IntegerGrid, dtype: torch.dtype = torch.float32, reordered: bool = False
) -> GroupedWeight:
    generator = torch.Generator().manual_seed(rows + columns * 7 + grid.bits)
    groups = grid.groups(columns)
    codes = torch.randint(0, grid.levels, (rows, columns), dtype=torch.uint8, generator=generator)
    sign = torch.where(torch.rand(groups, rows, generator=generator) < 0.5, -1.0, 1.0)  # symmetric grids use both
    scales = (sign * (torch.rand(groups, rows, generator=generator) + 0.1)).to(dtype)
    zeros = torch.randint(0, grid.levels, (groups, rows), dtype=torch.uint8, generator=generator)
    permutation = torch.randperm(columns, generator=generator) if reordered else None
    return GroupedWeight(grid, codes, scales, None if grid.symmetric else zeros, permutation)


def _spec(weight: GroupedWeight, has_bias: bool = False) -> LinearSpec:
    rows, columns = weight.codes.shape
    return LinearSpec("model.layers.0.mlp.up_proj", columns, rows, has_bias, weight.scales.dtype)


def _layer(weight: GroupedWeight, bias: torch.Tensor | None = None) -> GroupedLinear:
    layer = GroupedLinear.from_weight(_spec(weight, bias is not None), weight, bias)
    layer.prepare()
    return layer


def _input(batch: int, columns: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(batch, columns, generator=torch.Generator().manual_seed(batch)).to(dtype)


def _error(layer: GroupedLinear, x: torch.Tensor, weight: GroupedWeight) -> float:
    """The largest error against the reference, in units of the sum of the magnitudes that were added up."""
    reference = GroupedLinear.from_weight(_spec(weight), weight).reference(x).double()
    magnitude = x.double().abs() @ weight.dequantize(torch.float64).abs().t()
    return ((layer(x).double() - reference).abs() / magnitude).max().item()


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize("group_size", [-1, 16, 32, 64, 128, 40])
@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_four_bit_products_equal_the_reference(
    rows: int, columns: int, group_size: int, symmetric: bool, dtype: torch.dtype
) -> None:
    weight = _weight(rows, columns, IntegerGrid(4, group_size, symmetric), dtype)
    layer = _layer(weight)
    for batch in (1, 5, KERNEL_BATCH, KERNEL_BATCH + 1):
        assert _error(layer, _input(batch, columns, dtype), weight) < TOLERANCE[dtype]


@pytest.mark.parametrize("bits", [2, 3, 8])
@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_other_widths_equal_the_reference(rows: int, columns: int, symmetric: bool, bits: int) -> None:
    weight = _weight(rows, columns, IntegerGrid(bits, 32, symmetric))
    assert _error(_layer(weight), _input(3, columns), weight) < TOLERANCE[torch.float32]


def test_the_reference_is_the_formula_written_out() -> None:
    weight = _weight(3, 10, IntegerGrid(3, 4, False))
    assert weight.zero_points is not None
    dense = torch.zeros(3, 10, dtype=torch.float64)
    for n in range(3):
        for k in range(10):
            dense[n, k] = (int(weight.codes[n, k]) - int(weight.zero_points[k // 4, n])) * weight.scales[k // 4, n]
    x = _input(2, 10)
    reference = GroupedLinear.from_weight(_spec(weight), weight).reference(x)
    assert torch.allclose(reference, (x.double() @ dense.t()).float())


@pytest.mark.parametrize("batch", [1, KERNEL_BATCH + 1])
def test_reordered_columns_multiply_the_features_they_came_from(batch: int) -> None:
    weight = _weight(48, 96, IntegerGrid(4, 32, False), reordered=True)
    assert weight.permutation is not None
    shuffled = weight.dequantize(torch.float64)[:, weight.permutation]
    plain = GroupedWeight(weight.grid, weight.codes, weight.scales, weight.zero_points)
    assert torch.equal(shuffled, plain.dequantize(torch.float64))
    assert _error(_layer(weight), _input(batch, 96), weight) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
def test_small_batches_take_the_packed_kernel_and_agree_with_the_tiles(
    symmetric: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kernel_block_rows() is None:
        pytest.skip("torch packs int4 in another layout on this machine")
    layer = _layer(_weight(130, 192, IntegerGrid(4, 64, symmetric)))
    x, calls = _input(4, 192), []
    kernel = torch._weight_int4pack_mm_for_cpu
    monkeypatch.setattr(torch, "_weight_int4pack_mm_for_cpu", lambda *a: calls.append(1) or kernel(*a))
    packed = layer(x)
    assert calls
    monkeypatch.setattr(grouped, "KERNEL_BATCH", 0)
    torch.testing.assert_close(layer(x), packed)
    assert len(calls) == 1


def test_a_state_saved_on_one_machine_serves_on_another(monkeypatch: pytest.MonkeyPatch) -> None:
    here = kernel_block_rows()
    weight = _weight(100, 64, IntegerGrid(4, 32))
    monkeypatch.setattr(grouped, "kernel_block_rows", lambda: 32 if here == 64 else 64)
    foreign = _layer(weight)
    assert foreign.codes.shape == packed_shape(100, 64, 4, 32 if here == 64 else 64)
    large = _input(KERNEL_BATCH + 1, 64)
    assert _error(foreign, large, weight) < TOLERANCE[torch.float32]


def test_bias_leading_dimensions_and_empty_batches() -> None:
    weight, bias = _weight(24, 64, IntegerGrid(4, 32)), torch.arange(24.0)
    layer, x = _layer(weight, bias), _input(6, 64).view(2, 3, 64)
    assert layer(x).shape == (2, 3, 24)
    torch.testing.assert_close(layer(x), (x.double() @ weight.dequantize(torch.float64).t() + bias).float())
    assert layer(x[:, :0]).shape == (2, 0, 24)


@pytest.mark.parametrize("reordered", [False, True])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_a_saved_state_fills_an_empty_shell(bits: int, symmetric: bool, reordered: bool) -> None:
    weight, bias = _weight(70, 96, IntegerGrid(bits, 32, symmetric), reordered=reordered), torch.ones(70)
    saved = GroupedLinear.from_weight(_spec(weight, True), weight, bias).state_dict()
    shell = GroupedLinear(_spec(weight, True), weight.grid, reordered=reordered)
    shell.fill(**saved)
    shell.prepare()
    assert torch.equal(shell(_input(2, 96)), _layer(weight, bias)(_input(2, 96)))


def test_unpacking_returns_the_weight() -> None:
    weight = _weight(70, 100, IntegerGrid(3, 32, False), reordered=True)
    layer = GroupedLinear.from_weight(_spec(weight), weight)
    assert torch.equal(layer.to_weight().codes, weight.codes)
    assert torch.equal(layer.dequantize(), weight.dequantize())


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_bytes_are_exact_and_nothing_is_held_twice(bits: int, symmetric: bool) -> None:
    layer = _layer(_weight(128, 256, IntegerGrid(bits, 64, symmetric), torch.bfloat16))
    assert layer.storage().weight_bytes == 128 * 256 * bits // 8
    assert layer.storage().metadata_bytes == 128 * 4 * (2 if symmetric else 3)
    if layer.packed is not None:
        assert layer.scales.numel() == layer.codes.numel() == 0
        table_bytes = 16 * 2
        zero_point_bytes = 0 if symmetric else 128 * 4  # the kernels read them in 16 bits
        expected = layer.storage().weight_bytes + layer.storage().metadata_bytes + table_bytes + zero_point_bytes
        assert layer.packed.nbytes == expected
    elif bits == 4 and kernel_block_rows():
        assert layer.scales.numel() == 0
        assert layer.codes.nbytes == layer.storage().weight_bytes


@pytest.mark.parametrize(("bits", "group_size"), [(5, 64), (4, 0)])
def test_a_grid_that_means_nothing_is_refused(bits: int, group_size: int) -> None:
    with pytest.raises(ValueError, match=r"bits|group_size"):
        IntegerGrid(bits, group_size)


@pytest.mark.gpu
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_cuda_products_equal_the_reference(bits: int) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    weight = _weight(200, 256, IntegerGrid(bits, 64, False), torch.bfloat16, reordered=True)
    layer = GroupedLinear.from_weight(_spec(weight), weight).cuda()
    layer.prepare()
    x = _input(7, 256, torch.bfloat16)
    reference = GroupedLinear.from_weight(_spec(weight), weight).reference(x)
    magnitude = x.double().abs() @ weight.dequantize(torch.float64).abs().t()
    assert ((layer(x.cuda()).cpu().double() - reference).abs() / magnitude).max() < TOLERANCE[torch.bfloat16]
