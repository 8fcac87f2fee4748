"""Sparse weights: the zeros cost a bit each, and every path multiplies by the same numbers as the plain reference."""

from __future__ import annotations

import pytest
import torch

from serve.compression.formats.linear import LinearSpec
from serve.compression.formats.sparse import SparseLinear
from serve.errors import ArtifactError
from serve.kernels import unavailable

SHAPES = [(64, 128), (33, 100), (1, 7), (130, 1100), (32, 32), (257, 320)]


def _weight(rows: int, columns: int, sparsity: float = 0.5) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rows + columns)
    weight = torch.randn(rows, columns, generator=generator)
    return weight * (torch.rand(rows, columns, generator=generator) >= sparsity)


def _layer(weight: torch.Tensor, dtype: torch.dtype, bias: torch.Tensor | None = None) -> SparseLinear:
    spec = LinearSpec("model.layers.0.mlp.up_proj", weight.shape[1], weight.shape[0], bias is not None, dtype)
    return SparseLinear.from_dense(spec, weight, bias)


def _input(batch: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(batch, columns, generator=torch.Generator().manual_seed(batch)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.5, 0.97, 1.0])
@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_products_equal_the_reference(rows: int, columns: int, sparsity: float, dtype: torch.dtype) -> None:
    weight = _weight(rows, columns, sparsity)
    plain, layer = _layer(weight, dtype), _layer(weight, dtype)
    layer.prepare()
    for batch in (1, 5, 40):
        x = _input(batch, columns, dtype)
        magnitude = x.double().abs() @ weight.double().abs().t() + 1e-9
        error = ((layer(x).double() - plain.reference(x).double()).abs() / magnitude).max()
        assert error < (1e-6 if dtype == torch.float32 else 1e-2)


def test_a_rows_answer_does_not_depend_on_the_rows_beside_it() -> None:
    if unavailable():
        pytest.skip("only the kernels promise it")
    layer = _layer(_weight(130, 1100), torch.bfloat16)
    layer.prepare()
    x = _input(50, 1100, torch.bfloat16)
    assert layer.kernel == "sparse packed"
    assert torch.equal(layer(x)[17:18], layer(x[17:18]))


def test_bias_leading_dimensions_and_empty_batches() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        layer = _layer(_weight(24, 64), dtype, torch.arange(24.0).to(dtype))
        x = _input(6, 64, dtype).view(2, 3, 64)
        expected = layer.reference(x)
        layer.prepare()
        torch.testing.assert_close(layer(x), expected, rtol=2e-2, atol=2e-2)
        assert layer(x[:, :0]).shape == (2, 0, 24)


def test_what_is_stored_comes_back() -> None:
    weight = _weight(33, 100)
    assert torch.equal(_layer(weight, torch.float32).dequantize(), weight)


def test_a_zero_costs_one_bit() -> None:
    weight = _weight(64, 128)
    layer = _layer(weight, torch.bfloat16)
    kept = int((weight != 0).sum())
    assert layer.storage().weight_bytes == 2 * kept
    assert layer.storage().metadata_bytes == 64 * 128 // 8
    layer.prepare()
    assert layer.storage().weight_bytes == 2 * kept
    if layer.packed is not None:
        assert layer.packed.nbytes == 2 * kept + 64 * 128 // 8 + 64 + 2 * 8  # and room to read on, and two panels


def test_a_saved_state_fills_an_empty_shell() -> None:
    layer = _layer(_weight(33, 100), torch.float32, torch.ones(33))
    shell = SparseLinear(layer.spec)
    shell.fill(**layer.state_dict())
    x = _input(2, 100, torch.float32)
    assert torch.equal(shell(x), layer(x))
    assert shell.storage() == layer.storage()


def test_a_state_that_contradicts_itself_is_refused() -> None:
    layer = _layer(_weight(33, 100), torch.float32)
    state = layer.state_dict()
    shell = SparseLinear(layer.spec)
    with pytest.raises(ArtifactError, match="mask keeps"):
        shell.fill(mask=state["mask"], values=state["values"][:-1])
    with pytest.raises(ArtifactError, match=r"up_proj\.mask"):
        shell.fill(values=state["values"])
    with pytest.raises(ArtifactError, match=r"up_proj\.values"):
        shell.fill(mask=state["mask"], values=state["values"].half())


@pytest.mark.gpu
def test_cuda_products_equal_the_reference() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    weight = _weight(130, 1100)
    layer, x = _layer(weight, torch.bfloat16), _input(7, 1100, torch.bfloat16)
    expected = layer.reference(x)
    layer.cuda().prepare()
    torch.testing.assert_close(layer(x.cuda()).cpu(), expected, rtol=2e-2, atol=0.3)
