"""A model without weights: built from its configuration alone, with every parameter on the meta device.

Knows where the blocks, the projections and the head of a decoder-only transformers model are, and how to put tensors
and layers in their places. Knows nothing about files or about compression.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from serve.compression.formats.linear import LinearSpec
from serve.errors import UnsupportedArchitecture

__all__ = ["DTYPES", "Skeleton", "build", "is_projection", "set_module", "set_tensor", "weight_of"]

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_ROUTERS = ("gate", "router", "shared_expert_gate")
_patching = threading.Lock()


@dataclass(frozen=True)
class Skeleton:
    """`blocks` are the decoder layers with their names; `projections` their linear layers; `routers` stay dense."""

    model: PreTrainedModel
    dtype: torch.dtype
    blocks: dict[str, nn.Module]
    projections: dict[str, nn.Module]
    routers: frozenset[str]
    head: str | None

    def spec(self, name: str) -> LinearSpec:
        """The projection's shape; `Conv1D` (GPT-2) keeps its weight transposed."""
        module = self.projections[name] if name in self.projections else self.model.get_submodule(name)
        weight = cast(Tensor, module.weight)
        rows, columns = weight.shape if isinstance(module, nn.Linear) else weight.shape[::-1]
        return LinearSpec(name, columns, rows, module.bias is not None, self.dtype)

    def dtype_of(self, parameter: str) -> torch.dtype:
        """The type a parameter is kept in: some models insist on float32 for a few."""
        strict = self.model._keep_in_fp32_modules_strict or set()
        loose = self.model._keep_in_fp32_modules or set() if self.dtype == torch.float16 else set()
        parts = parameter.split(".")
        return torch.float32 if any(part in strict or part in loose for part in parts) else self.dtype


def build(config: PretrainedConfig, dtype: torch.dtype) -> Skeleton:
    """The empty model in evaluation mode. Code that a checkpoint brings along is never run."""
    try:
        with _parameters_on_meta():
            auto: Any = AutoModelForCausalLM
            model: PreTrainedModel = auto.from_config(config, dtype=dtype, trust_remote_code=False)
    except (ValueError, ImportError, AttributeError, KeyError, TypeError) as error:
        name = (config.architectures or [config.model_type or "unknown"])[0]
        reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
        raise UnsupportedArchitecture(f"{name}: not a causal language model to be built here ({reason})") from error
    model.train(False).requires_grad_(False)
    blocks = _blocks(model)
    linear = {
        f"{block}.{name}": module
        for block, parent in blocks.items()
        for name, module in parent.named_modules()
        if is_projection(module)
    }
    routers = frozenset(name for name in linear if name.rsplit(".", 1)[-1] in _ROUTERS)
    projections = {name: module for name, module in linear.items() if name not in routers}
    return Skeleton(model, dtype, blocks, projections, routers, _head(model))


def is_projection(module: nn.Module) -> bool:
    """A dense linear layer, whichever way round it keeps its weight."""
    return type(module) is nn.Linear or isinstance(module, Conv1D)


def weight_of(module: nn.Module, tensor: Tensor) -> Tensor:
    """`tensor`, this module's stored weight, as `[out_features, in_features]`."""
    return tensor if isinstance(module, nn.Linear) else tensor.t()


def set_module(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)


def set_tensor(model: nn.Module, name: str, tensor: Tensor | nn.Parameter) -> None:
    """Put a parameter or a buffer in its place."""
    parent, _, leaf = name.rpartition(".")
    owner = model.get_submodule(parent)
    if leaf in owner._parameters:
        owner._parameters[leaf] = (
            tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor, requires_grad=False)
        )
    else:
        owner._buffers[leaf] = tensor


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Parameters are registered without memory, while buffers (rotary tables and the like) are computed as usual."""
    module: Any = nn.Module
    register = module.register_parameter

    def on_meta(self: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and parameter.device.type != "meta":
            kept: Any = type(parameter)(parameter.data.to("meta"), requires_grad=False)
            parameter = kept
        register(self, name, parameter)

    with _patching:
        module.register_parameter = on_meta
        try:
            yield
        finally:
            module.register_parameter = register


def _blocks(model: PreTrainedModel) -> dict[str, nn.Module]:
    """The decoder layers: the first list of as many alike modules as the configuration has layers."""
    count = getattr(model.config.get_text_config(decoder=True), "num_hidden_layers", None)
    lists = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    for name, layers in lists:
        if len(layers) == count:
            return {f"{name}.{index}": layer for index, layer in enumerate(layers)}
    raise UnsupportedArchitecture(f"{type(model).__name__}: no list of {count} decoder layers found")


def _head(model: PreTrainedModel) -> str | None:
    anything: Any = model
    head = anything.get_output_embeddings()
    return next((name for name, module in model.named_modules() if module is head), None) if head is not None else None
