"""The load report of a filled model: what it holds, how each layer is multiplied, and what the recipe left alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from serve.compression.formats.linear import CompressedLinear
from serve.compression.plan import Plan
from serve.compression.report import LoadReport, measure
from serve.compression.skeleton import Skeleton

__all__ = ["account"]


def account(
    skeleton: Skeleton,
    plan: Plan,
    seconds: Mapping[str, float],
    peak_bytes: int,
    *,
    mapped: frozenset[int] = frozenset(),
    artifact_hit: bool = False,
    calibration_tokens: int = 0,
    activation_bytes: int = 0,
    hessian_bytes: int = 0,
    original_parameters: int | None = None,
    quality: Mapping[str, Any] | None = None,
    unused_keys: tuple[str, ...] = (),
) -> LoadReport:
    """Add up a model that has been filled. `mapped` holds the addresses of tensors that lie in a file."""
    model, recipe = skeleton.model, plan.recipe
    projections = {name: model.get_submodule(name) for name in skeleton.projections}
    found = measure(model, projections)
    original = original_parameters or found.parameters
    kernels: dict[str, int] = {}
    for module in projections.values():
        path = module.kernel if isinstance(module, CompressedLinear) else f"dense {recipe.dtype}"
        kernels[path] = kernels.get(path, 0) + 1
    return LoadReport(
        recipe=recipe.name,
        precision=recipe.precision,
        weight_bytes=found.weight_bytes,
        quantization_bytes=found.quantization_bytes,
        embedding_bytes=found.embedding_bytes,
        total_bytes=found.total_bytes,
        parameters=found.parameters,
        bits_per_weight=found.bits_per_weight,
        bits_per_parameter=8 * found.total_bytes / found.parameters,
        compression_ratio=2 * original / found.total_bytes,
        compression_ratio_fp32=4 * original / found.total_bytes,
        seconds=dict(seconds),
        peak_load_bytes=peak_bytes,
        kernels=kernels,
        device=str(plan.device),
        mapped_bytes=_mapped_bytes(skeleton, mapped),
        artifact_hit=artifact_hit,
        calibration_tokens=calibration_tokens,
        activation_bytes=activation_bytes,
        hessian_bytes=hessian_bytes,
        original_parameters=original,
        quality=dict(quality or {}),
        uncovered=_uncovered(skeleton) if recipe.quantizer else {},
        unused_keys=unused_keys,
    )


def _mapped_bytes(skeleton: Skeleton, mapped: frozenset[int]) -> int:
    tensors = [*skeleton.model.parameters(), *skeleton.model.buffers()]
    return sum(tensor.nbytes for tensor in tensors if tensor.numel() and tensor.data_ptr() in mapped)


def _uncovered(skeleton: Skeleton) -> dict[str, str]:
    """Weight matrices that stayed in floating point, and why."""
    model, head = skeleton.model, skeleton.head
    reasons: dict[str, str] = {}
    for name, parameter in model.named_parameters():
        module_name = name.rpartition(".")[0]
        module = model.get_submodule(module_name)
        if parameter.dim() < 2 or isinstance(module, torch.nn.Embedding) or module_name == head:
            continue
        if parameter.dim() > 2:
            reasons[name] = "stacked experts"
        elif module_name in skeleton.routers:
            reasons[name] = "router"
        elif module_name in skeleton.projections:
            reasons[name] = "skipped by the recipe"
        else:
            reasons[name] = "outside the decoder's linear layers"
    return reasons
