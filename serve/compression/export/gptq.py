"""Writes a compressed model in the GPTQ checkpoint format, which transformers, GPTQModel and vLLM read.

Symmetric weights go out as format "gptq" (zero points stored less one), asymmetric ones as "gptq_v2": the older form
cannot say zero point 0. Scales become fp16, as readers expect. Columns that activation order brought together go back
to their places, with `g_idx` saying which group each belongs to. Layers that the recipe skips stay dense, and readers
are told by GPTQModel's `dynamic` rules.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from serve.compression.formats.grouped import GroupedLinear
from serve.compression.formats.integer_grid import GroupedWeight
from serve.compression.plan import Plan
from serve.compression.restore import take_layers
from serve.compression.skeleton import Skeleton
from serve.compression.stages import Grouped
from serve.errors import RecipeError

__all__ = ["check_gptq", "write_gptq"]

Parts = Iterable[tuple[str, Mapping[str, Tensor]]]


def check_gptq(plan: Plan) -> None:
    """Raise `RecipeError` unless the format can hold what the recipe makes."""
    recipe = plan.recipe
    if not isinstance(recipe.quantizer, Grouped) or recipe.lm_head != "keep":
        raise RecipeError(f"recipe {recipe.name}: the gptq format holds rtn, gptq or awq, with the head kept")
    if recipe.overrides:
        raise RecipeError(f"recipe {recipe.name}: the gptq format holds one precision; leave out `overrides`")


def write_gptq(folder: Path, skeleton: Skeleton, plan: Plan, parts: Parts) -> None:
    """One safetensors shard per part, then an index and the configuration, into the existing `folder`."""
    shards: dict[str, str] = {}  # tensor -> file
    size_bytes = 0
    for part, tensors in parts:
        layers, dense = take_layers(skeleton, plan, part, tensors)
        out = {name: tensor.detach().cpu().contiguous() for name, tensor in dense.items()}
        for name, layer in layers.items():
            assert isinstance(layer, GroupedLinear)
            out |= {f"{name}.{key}": tensor for key, tensor in _gptq_tensors(layer.to_weight()).items()}
            if layer.bias is not None:
                out[f"{name}.bias"] = layer.bias
        save_file(out, folder / f"{part}.safetensors", metadata={"format": "pt"})
        shards |= dict.fromkeys(out, f"{part}.safetensors")
        size_bytes += sum(tensor.nbytes for tensor in out.values())
    settings = gptq_settings(skeleton, plan)
    # The configuration of the model at hand, which pruning of structure made smaller than its source.
    _write(folder / "config.json", {**skeleton.model.config.to_dict(), "quantization_config": settings})
    _write(folder / "quantize_config.json", settings)
    _write(folder / "model.safetensors.index.json", {"metadata": {"total_size": size_bytes}, "weight_map": shards})


def _write(path: Path, data: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=2, sort_keys=True) + "\n")


def gptq_settings(skeleton: Skeleton, plan: Plan) -> dict[str, Any]:
    """`quantization_config`, as readers know it."""
    stage = plan.recipe.quantizer
    assert isinstance(stage, Grouped)
    skipped = [name for name in skeleton.projections if plan.treatment(name).quantizer is None]
    rules: dict[str, Any] = {f"-:^{re.escape(name)}$": {} for name in skipped}
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
        **({"dynamic": rules} if rules else {}),
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
