"""Finished parts back into an empty model: what an artifact hit does instead of compressing.

Each layer's empty shell is built from the recipe's plan, exactly as compressing would have built it, and takes the
saved tensors as they are, mapped from the file. Knows nothing about where the tensors come from.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from serve.compression.formats.head import Float32Head
from serve.compression.formats.linear import CompressedLinear
from serve.compression.plan import Plan
from serve.compression.skeleton import Skeleton, set_module, set_tensor
from serve.errors import ArtifactError

__all__ = ["REST", "finish_rest", "move_buffers", "restore", "restore_part", "shells", "take_layers"]

REST = "rest"


@torch.no_grad()
def restore(skeleton: Skeleton, plan: Plan, read: Callable[[str], Mapping[str, Tensor]]) -> None:
    """Fill the whole model from parts; raise `ArtifactError` where one does not fit."""
    for part in (REST, *skeleton.blocks):
        restore_part(skeleton, plan, part, read(part))
    missing = [name for name, parameter in skeleton.model.named_parameters() if parameter.is_meta]
    if missing:
        raise ArtifactError(f"the artifact lacks {missing[0]}")
    move_buffers(skeleton.model, plan.device)


def restore_part(skeleton: Skeleton, plan: Plan, part: str, tensors: Mapping[str, Tensor]) -> None:
    """Fill one block, or everything outside the blocks."""
    model = skeleton.model
    layers, left = take_layers(skeleton, plan, part, tensors)
    for name, layer in layers.items():
        layer.prepare()
        set_module(model, name, layer.eval())
    shapes = {name: parameter.shape for name, parameter in model.named_parameters(remove_duplicate=False)}
    for name, tensor in left.items():
        if shapes.get(name) != tensor.shape:
            raise ArtifactError(f"{name}: the artifact holds {list(tensor.shape)}, which does not fit the model")
        set_tensor(model, name, tensor.to(plan.device))
    if part == REST:
        _tie(skeleton)
        finish_rest(skeleton, plan)


def take_layers(
    skeleton: Skeleton, plan: Plan, part: str, tensors: Mapping[str, Tensor]
) -> tuple[dict[str, CompressedLinear], dict[str, Tensor]]:
    """The part's compressed layers, filled but not prepared, and the tensors that are left: ordinary parameters."""
    layers, left = {}, dict(tensors)
    for name, shell in shells(skeleton, plan, part):
        prefix = f"{name}."
        own = {key.removeprefix(prefix): left.pop(key) for key in list(left) if key.startswith(prefix)}
        shell.fill(**{key: tensor.to(plan.device) for key, tensor in own.items()})
        layers[name] = shell
    return layers, left


def finish_rest(skeleton: Skeleton, plan: Plan) -> None:
    """What the recipe does to a head that keeps its weights."""
    if plan.float32_head and skeleton.head is not None:
        head = skeleton.model.get_submodule(skeleton.head)
        if isinstance(head, nn.Linear):
            set_module(skeleton.model, skeleton.head, Float32Head(head))


def move_buffers(module: nn.Module, device: torch.device) -> None:
    """Tables that the model computed for itself (rotary frequencies and the like) follow the weights."""
    for owner in module.modules():
        if not isinstance(owner, CompressedLinear):
            for name, buffer in owner._buffers.items():
                owner._buffers[name] = buffer if buffer is None else buffer.to(device)


def shells(skeleton: Skeleton, plan: Plan, part: str) -> list[tuple[str, CompressedLinear]]:
    """Empty layers for the projections of a part (and the head, for the rest) that the plan compresses."""
    if part == REST:
        if plan.head is None or skeleton.head is None:
            return []
        return [(skeleton.head, plan.head.shell(skeleton.spec(skeleton.head)))]
    names = [name for name in skeleton.projections if name.startswith(f"{part}.")]
    quantizers = [(name, plan.treatment(name).quantizer) for name in names]
    return [(name, quantizer.shell(skeleton.spec(name))) for name, quantizer in quantizers if quantizer is not None]


def _tie(skeleton: Skeleton) -> None:
    """Parameters that were saved once under one of their names."""
    model = skeleton.model
    names = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    for target, source in model.all_tied_weights_keys.items():
        for empty, full in ((target, source), (source, target)):
            if empty in names and full in names and model.get_parameter(empty).is_meta:
                set_tensor(model, empty, model.get_parameter(full))
