"""Our layers as GGUF's blocks of 32 weights: the same integers and the same scales, nothing is rounded again but these.

    Q8_0   d fp16, 32 x int8                    w = q d                  8.5 bits per weight
    Q4_0   d fp16, 32 x 4 bits                  w = (q - 8) d            4.5
    Q4_1   d fp16, m fp16, 32 x 4 bits          w = q d + m              5.0

A scale that several blocks share (of a row, or of a group of 64 or 128) is repeated in each. Low nibbles of a 4-bit
block hold its first half, high nibbles the second.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from serve.compression.formats.grouped import GroupedLinear
from serve.compression.formats.int8 import Int8Linear
from serve.compression.formats.int8_weight import Int8WeightLinear
from serve.compression.formats.linear import CompressedLinear
from serve.errors import CompressionError, RecipeError

__all__ = ["BLOCK", "Blocks", "block_type", "to_blocks"]

BLOCK = 32


@dataclass(frozen=True)
class Blocks:
    """`data` uint8 `[out_features, bytes of a row]` of GGUF's type `type`."""

    type: str
    data: Tensor


def block_type(layer: CompressedLinear) -> str:
    """GGUF's name of the type that holds the layer exactly; raise `RecipeError` naming the layer if there is none."""
    name, width = layer.spec.name, layer.in_features
    if width % BLOCK:
        raise RecipeError(f"{name}: its {width} inputs do not divide into GGUF's blocks of {BLOCK}; skip the layer")
    if type(layer) in (Int8Linear, Int8WeightLinear):
        return "Q8_0"
    if not isinstance(layer, GroupedLinear):
        raise RecipeError(f"{name}: GGUF holds int8 and 4- or 8-bit rtn, gptq and awq, not {layer.kernel.split()[0]}")
    grid = layer.grid
    if layer.reordered:
        raise RecipeError(f"{name}: GGUF groups neighbouring columns only; leave out activation order (-act)")
    if grid.columns_per_group(width) % BLOCK:
        raise RecipeError(f"{name}: groups of {grid.group_size} are no multiple of GGUF's blocks of {BLOCK}; use g32")
    if grid.bits == 4:
        return "Q4_0" if grid.symmetric else "Q4_1"
    if grid.bits == 8 and grid.symmetric:
        return "Q8_0"
    kind = f"{grid.bits} bits, {'symmetric' if grid.symmetric else 'asymmetric'}"
    raise RecipeError(f"{name}: GGUF holds 4 bits, and 8 bits symmetric, not {kind}")


def to_blocks(layer: CompressedLinear, rows: Tensor | None = None) -> Blocks:
    """The layer's values, its rows in the order `rows` int64 `[out_features]`."""
    kind = block_type(layer)
    codes, scales, zeros = _values(layer)
    if rows is not None:
        codes, scales, zeros = codes[rows], scales[rows], None if zeros is None else zeros[rows]
    header = [_fp16(scales, layer.spec.name)]
    if zeros is not None:
        header.append(_fp16(-zeros.float() * scales.float(), layer.spec.name))
    codes = codes.view(codes.shape[0], -1, BLOCK)
    if kind != "Q8_0":
        low, high = codes.chunk(2, dim=2)
        codes = low | (high << 4)
    data = torch.cat([part.unsqueeze(2).view(torch.uint8) for part in header] + [codes.view(torch.uint8)], dim=2)
    return Blocks(kind, data.flatten(1).contiguous())


def _values(layer: CompressedLinear) -> tuple[Tensor, Tensor, Tensor | None]:
    """Codes `[out, in]`, and scales and zero points of every block `[out, in / 32]`."""
    if isinstance(layer, GroupedLinear):
        weight = layer.to_weight()
        group = torch.arange(layer.in_features // BLOCK) * BLOCK // weight.grid.columns_per_group(layer.in_features)
        zeros = None if weight.zero_points is None else weight.zero_points.t()[:, group]
        codes = weight.codes
        if weight.grid.bits == 8:
            codes = (codes.to(torch.int16) - weight.grid.middle).to(torch.int8)
        return codes, weight.scales.t()[:, group], zeros
    assert isinstance(layer, (Int8Linear, Int8WeightLinear))
    return layer.weight, layer.scale[:, None].expand(-1, layer.in_features // BLOCK), None


def _fp16(values: Tensor, name: str) -> Tensor:
    stored = values.to(torch.float16)
    if not bool(stored.isfinite().all()):
        raise CompressionError(f"{name}: a scale is too large for GGUF's 16-bit floats")
    return stored.contiguous()
