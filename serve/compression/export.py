"""Writes a compressed model in the GPTQ checkpoint format, which transformers, GPTQModel and vLLM read.

Symmetric weights go out as format "gptq" (zero points stored less one), asymmetric ones as "gptq_v2": the older form
cannot say zero point 0. Scales become fp16, as readers expect. Columns that activation order brought together go back
to their places, with `g_idx` saying which group each belongs to.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from serve.compression.formats.grouped import GroupedLinear
from serve.compression.formats.integer_grid import GroupedWeight
from serve.compression.plan import Plan
from serve.compression.recipe import Recipe
from serve.compression.skeleton import Skeleton
from serve.compression.stages import Grouped
from serve.errors import RecipeError

__all__ = ["GptqExport"]

_BITS = (2, 3, 4, 8)


class GptqExport:
    """A sink for the driver: one safetensors shard per part, then an index and the configuration."""

    def __init__(self, folder: Path, skeleton: Skeleton, plan: Plan) -> None:
        stage = plan.recipe.quantizer
        if not isinstance(stage, Grouped) or stage.bits not in _BITS or plan.recipe.lm_head != "keep":
            raise RecipeError(f"recipe {plan.recipe.name}: the gptq format holds rtn, gptq or awq, with the head kept")
        self._folder, self._skeleton, self._plan, self._stage = folder, skeleton, plan, stage
        self._shards: dict[str, str] = {}  # tensor -> file
        self._size_bytes = 0
        folder.mkdir(parents=True, exist_ok=True)

    def read(self, part: str) -> None:
        return None

    def write(self, part: str, tensors: Mapping[str, Tensor]) -> None:
        left = dict(tensors)
        out: dict[str, Tensor] = {}
        for name in self._skeleton.projections:
            quantizer = self._plan.treatment(name).quantizer
            prefix = f"{name}."
            if quantizer is None or f"{prefix}codes" not in left:
                continue
            layer = quantizer.shell(self._skeleton.spec(name))
            assert isinstance(layer, GroupedLinear)
            layer.fill(**{key.removeprefix(prefix): left.pop(key) for key in list(left) if key.startswith(prefix)})
            out |= {prefix + key: tensor for key, tensor in _gptq_tensors(layer.to_weight()).items()}
            if layer.bias is not None:
                out[f"{prefix}bias"] = layer.bias
        file = f"{part}.safetensors"
        out |= {name: tensor.detach().cpu().contiguous() for name, tensor in left.items()}
        save_file(out, self._folder / file, metadata={"format": "pt"})
        self._shards |= dict.fromkeys(out, file)
        self._size_bytes += sum(tensor.nbytes for tensor in out.values())

    def finish(self, config: Mapping[str, Any]) -> None:
        """Write the index, and `config` with what readers need to know."""
        settings = gptq_settings(self._plan.recipe)
        self._write("config.json", {**config, "quantization_config": settings})
        self._write("quantize_config.json", settings)
        index = {"metadata": {"total_size": self._size_bytes}, "weight_map": self._shards}
        self._write("model.safetensors.index.json", index)

    def _write(self, name: str, data: Mapping[str, Any]) -> None:
        (self._folder / name).write_text(json.dumps(data, indent=2, sort_keys=True) + "\n")


def gptq_settings(recipe: Recipe) -> dict[str, Any]:
    """`quantization_config` for a recipe with a grouped quantizer."""
    stage = recipe.quantizer
    assert isinstance(stage, Grouped)
    return {
        "quant_method": "gptq",
        "checkpoint_format": "gptq" if stage.symmetric else "gptq_v2",
        "bits": stage.bits,
        "group_size": stage.group_size,
        "sym": stage.symmetric,
        "desc_act": bool(getattr(stage, "activation_order", False)),
        "lm_head": False,
        "pack_dtype": "int32",
        "meta": {"quantizer": ["halftone"]},
    }


def _gptq_tensors(weight: GroupedWeight) -> dict[str, Tensor]:
    grid, columns = weight.grid, weight.codes.shape[1]
    codes, index = weight.codes, grid.group_index(columns)
    if weight.permutation is not None:
        natural = torch.empty_like(weight.permutation)
        natural[weight.permutation] = torch.arange(columns)
        codes, index = codes[:, natural], index[natural]
    zeros = weight.zero_points
    if zeros is None:
        zeros = torch.full(weight.scales.shape, grid.middle - 1, dtype=torch.uint8)
    return {
        "qweight": _pack(codes, grid.bits).t().contiguous(),
        "qzeros": _pack(zeros, grid.bits),
        "scales": weight.scales.to(torch.float16).contiguous(),
        "g_idx": index.to(torch.int32),
    }


def _pack(codes: Tensor, bits: int) -> Tensor:
    """uint8 `[rows, n]` to int32 `[rows, ceil(n * bits / 32)]`, lowest bits first; zeros fill the last word."""
    count = -(-codes.shape[1] * bits // 32)
    words = torch.zeros(codes.shape[0], count + 1, dtype=torch.int64)
    first = torch.arange(codes.shape[1]) * bits
    shifted = codes.to(torch.int64) << (first % 32)
    words.index_add_(1, first // 32, shifted & 0xFFFFFFFF)
    words.index_add_(1, first // 32 + 1, shifted >> 32)
    return words[:, :count].to(torch.int32).contiguous()
