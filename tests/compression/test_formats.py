"""Every format's fast kernel against its plain reference, over shapes and batch sizes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from serve.compression import methods
from serve.compression.formats import CompressedLinear, LinearSpec
from serve.compression.formats.int8 import Int8Linear, quantize_tokens
from serve.compression.formats.nf4 import LEVELS, bitsandbytes_functional
from serve.compression.method import Group, Projection
from serve.compression.recipe import Recipe
from serve.errors import ArtifactError, UnsupportedHardware

SHAPES = [(64, 64), (96, 128), (50, 33), (128, 200)]
BATCHES = [1, 2, 7, 64]
RECIPES = ["int8", "int8-weight", "nf4", "nf4-dq", "nf4-b128"]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1.5e-2}


def make(
    recipe: str, shape: tuple[int, int], dtype: torch.dtype, *, bias: bool = True, seed: int = 0
) -> CompressedLinear:
    generator = torch.Generator().manual_seed(seed)
    out_features, in_features = shape
    spec = LinearSpec("layer", in_features, out_features, True, dtype)
    weight = torch.randn(shape, generator=generator)
    offsets = torch.randn(out_features, generator=generator).to(dtype)
    stage = Recipe.parse(recipe).quantizer
    assert stage is not None
    return methods.quantizer(stage).quantize(Group([Projection(spec, weight, offsets)]), None)[0]


def inputs(tokens: int, features: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(tokens, features, generator=torch.Generator().manual_seed(tokens)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("recipe", RECIPES)
def test_the_kernel_agrees_with_its_reference(recipe: str, shape: tuple[int, int], dtype: torch.dtype) -> None:
    layer, plain = make(recipe, shape, dtype), make(recipe, shape, dtype)
    layer.prepare()
    for tokens in BATCHES:
        x = inputs(tokens, shape[1], dtype)
        expected = plain.reference(x).float()
        found = layer(x)
        assert found.dtype == dtype
        assert (found.float() - expected).abs().max() <= TOLERANCE[dtype] * expected.abs().max()


@pytest.mark.parametrize("recipe", RECIPES)
def test_weights_that_lie_anywhere_in_a_mapped_file_are_multiplied(recipe: str) -> None:
    """Where they begin depends on the length of the file's header."""
    layer, plain = make(recipe, (96, 128), torch.bfloat16), make(recipe, (96, 128), torch.bfloat16)
    for name, buffer in list(layer.named_buffers()):
        file = torch.empty(buffer.nbytes + 64, dtype=torch.uint8)
        begin = -file.data_ptr() % 64 + 8
        setattr(layer, name, file[begin : begin + buffer.nbytes].view(buffer.dtype).view(buffer.shape).copy_(buffer))
        assert getattr(layer, name).data_ptr() % 16 == 8
    layer.prepare()
    x = inputs(7, 128, torch.bfloat16)
    torch.testing.assert_close(layer(x).float(), plain.reference(x).float(), rtol=0.02, atol=0.2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_int8_is_bit_identical_to_its_reference_and_whatever_the_batch(
    shape: tuple[int, int], dtype: torch.dtype
) -> None:
    layer, plain = make("int8", shape, dtype), make("int8", shape, dtype)
    layer.prepare()
    x = inputs(40, shape[1], dtype)
    together = layer(x)
    assert torch.equal(together, plain.reference(x))
    assert torch.equal(together, torch.cat([layer(row) for row in x.split(1)]))
    assert torch.equal(together, torch.cat([layer(rows) for rows in x.split(7)]))
    assert torch.equal(together, layer(x.view(2, 20, -1)).view_as(together))


@pytest.mark.parametrize("recipe", RECIPES)
def test_dequantized_weights_stay_within_half_a_step(recipe: str) -> None:
    layer = make(recipe, (96, 128), torch.float32)
    weight = torch.randn(96, 128, generator=torch.Generator().manual_seed(0))
    step = weight.abs().amax(1, keepdim=True) * (1 / 127 if recipe.startswith("int8") else 0.31)
    assert ((layer.dequantize() - weight).abs() <= 0.51 * step).all()


@pytest.mark.parametrize("recipe", RECIPES)
def test_all_zero_rows_stay_zero(recipe: str) -> None:
    spec = LinearSpec("layer", 64, 32, False, torch.bfloat16)
    weight = torch.randn(32, 64)
    weight[3] = 0
    stage = Recipe.parse(recipe).quantizer
    assert stage is not None
    layer = methods.quantizer(stage).quantize(Group([Projection(spec, weight)]), None)[0]
    layer.prepare()
    assert (layer(torch.randn(5, 64).bfloat16())[:, 3] == 0).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_broken_token_breaks_its_own_output_only(bad: float) -> None:
    layer = make("int8", (64, 64), torch.bfloat16)
    layer.prepare()
    x = inputs(3, 64, torch.bfloat16)
    clean = layer(x)
    x[1, 5] = bad
    found = layer(x)
    assert not found[1].isfinite().any()
    assert torch.equal(found[::2], clean[::2])


def test_tokens_use_the_whole_range() -> None:
    values, scale = quantize_tokens(torch.tensor([[1.0, -2.0, 0.5], [0.0, 0.0, 0.0]]))
    assert values.tolist() == [[64.0, -127.0, 32.0], [0.0, 0.0, 0.0]]
    assert scale[0].item() == pytest.approx(2 / 127)


@pytest.mark.parametrize("recipe", RECIPES)
def test_preparing_leaves_no_second_copy(recipe: str) -> None:
    layer = make(recipe, (128, 256), torch.bfloat16)
    layer.prepare()
    layer.prepare()
    held = {name: value for name, value in vars(layer).items() if isinstance(value, Tensor)} | dict(
        layer.named_buffers()
    )
    packed = sum(t.numel() * t.element_size() for name, t in held.items() if t.numel() and name != "_zero_points")
    storage = layer.storage()
    total = storage.weight_bytes + storage.metadata_bytes + storage.bias_bytes
    assert packed <= total * 1.02 + 64


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_shell_takes_what_the_layer_saved(recipe: str) -> None:
    layer = make(recipe, (64, 128), torch.bfloat16)
    stage = Recipe.parse(recipe).quantizer
    assert stage is not None
    shell = methods.quantizer(stage).shell(layer.spec)
    assert all(buffer.is_meta for buffer in shell.buffers())
    shell.fill(**layer.state_dict())
    layer.prepare()
    shell.prepare()
    x = inputs(3, 128, torch.bfloat16)
    assert torch.equal(shell(x), layer(x))


def test_a_shell_refuses_tensors_of_another_form() -> None:
    layer = make("int8", (64, 128), torch.bfloat16)
    shell = Int8Linear(LinearSpec("model.layers.0.q_proj", 128, 32, True, torch.bfloat16))
    with pytest.raises(ArtifactError, match=r"model\.layers\.0\.q_proj"):
        shell.fill(**layer.state_dict())


def test_double_quantization_stores_fewer_bits() -> None:
    plain, double = (
        make("nf4", (256, 256), torch.float32).storage(),
        make("nf4-dq", (256, 256), torch.float32).storage(),
    )
    assert double.weight_bytes == plain.weight_bytes
    assert double.metadata_bytes < plain.metadata_bytes


def test_llm_int8_elsewhere_than_cuda_names_int8() -> None:
    stage = Recipe.parse("llm-int8").quantizer
    assert stage is not None
    with pytest.raises(UnsupportedHardware, match="use int8"):
        methods.quantizer(stage).check(torch.device("cpu"), torch.bfloat16)


def test_the_levels_of_nf4_are_those_of_bitsandbytes() -> None:
    assert torch.tensor(LEVELS).equal(bitsandbytes_functional().get_4bit_type("nf4", device="cpu"))
