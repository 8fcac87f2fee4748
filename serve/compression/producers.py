"""What makes a group's input, where a factor per channel can be folded into it without changing the model.

Three cases, all exact: a norm whose output only the group reads; the values of attention before its output projection
(heads that share values share factors); and the linear half of a gated MLP before its last projection. Elsewhere,
behind an activation function or a router that reads the same norm, nothing can absorb a factor: no producer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from serve.compression.method import Producer, Projection
from serve.compression.skeleton import Skeleton

__all__ = ["NormTrace", "find_producer", "watch_norms"]

_ATTENTION_INPUT = ("q_proj", "k_proj", "v_proj")
_ATTENTION_OUTPUT = ("o_proj", "out_proj")
_VALUE, _GATE, _UP, _DOWN = "v_proj", "gate_proj", "up_proj", "down_proj"

NormTrace = dict[str, str]
"""Projection -> the norm whose very output it reads."""


@contextmanager
def watch_norms(skeleton: Skeleton, block: str) -> Iterator[NormTrace]:
    """While the block runs inside, note which projection reads which norm."""
    trace: NormTrace = {}
    outputs: list[tuple[Tensor, str]] = []
    handles = []
    for name, module in skeleton.model.get_submodule(block).named_modules(prefix=block):
        if _is_norm(module):
            handles.append(module.register_forward_hook(_note_output(outputs, name)))
        elif name in skeleton.projections:
            handles.append(module.register_forward_pre_hook(_note_input(outputs, trace, name)))
    try:
        yield trace
    finally:
        for handle in handles:
            handle.remove()


def find_producer(
    skeleton: Skeleton, group: Sequence[str], trace: NormTrace, load: Callable[[str], Projection]
) -> Producer | None:
    """The producer of `group`, projections that share an input. `load` gives a projection's values, kept for later."""
    first = group[0]
    parent, _, leaf = first.rpartition(".")
    norms = {trace.get(name) for name in group}
    readers = {name for name, norm in trace.items() if norm in norms}
    if len(norms) == 1 and (norm := norms.pop()) is not None:
        alone = readers == set(group) and (leaf in _ATTENTION_INPUT or not _has_router(skeleton, first))
        return _NormProducer(skeleton.model.get_submodule(norm)) if alone else None
    value, up = f"{parent}.{_VALUE}", f"{parent}.{_UP}"
    if leaf in _ATTENTION_OUTPUT and value in skeleton.projections:
        return _value_producer(skeleton, first, value, load)
    if leaf == _DOWN and up in skeleton.projections and f"{parent}.{_GATE}" in skeleton.projections:
        return _ProjectionProducer(load(up), repeat=1, width=1)
    return None


def _value_producer(skeleton: Skeleton, output: str, value: str, load: Callable[[str], Projection]) -> Producer | None:
    config = skeleton.model.config.get_text_config(decoder=True)
    inputs, channels = skeleton.spec(output).in_features, skeleton.spec(value).out_features
    heads = config.num_attention_heads
    attention = skeleton.model.get_submodule(output.rpartition(".")[0])
    normalised = any("v_norm" in name for name, _ in attention.named_modules())
    if inputs % heads or inputs % channels or channels % (inputs // heads) or normalised:
        return None
    return _ProjectionProducer(load(value), repeat=inputs // channels, width=inputs // heads)


class _NormProducer:
    """A norm's weight (and bias): `w`, or `1 + w` in Gemma's spelling."""

    def __init__(self, norm: Any) -> None:
        self._norm = norm
        self.channels: int = norm.weight.numel()

    def spread(self, scale: Tensor) -> Tensor:
        return scale

    def divide(self, scale: Tensor) -> None:
        offset = _unit_offset(self._norm)
        weight = (self._norm.weight.float() + offset) / scale.float() - offset
        self._norm.weight.data = weight.to(self._norm.weight.dtype)
        if getattr(self._norm, "bias", None) is not None:
            self._norm.bias.data = (self._norm.bias.float() / scale.float()).to(self._norm.bias.dtype)


class _ProjectionProducer:
    """Rows of the projection before; each run of `width` outputs feeds `repeat` runs of inputs."""

    def __init__(self, projection: Projection, *, repeat: int, width: int) -> None:
        self._projection, self._repeat, self._width = projection, repeat, width
        self.channels = projection.spec.out_features

    def spread(self, scale: Tensor) -> Tensor:
        return scale.view(-1, self._width).repeat_interleave(self._repeat, dim=0).reshape(-1)

    def divide(self, scale: Tensor) -> None:
        self._projection.weight /= scale[:, None]
        if self._projection.bias is not None:
            bias = self._projection.bias
            self._projection.bias = (bias.float() / scale).to(bias.dtype)


def _is_norm(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return isinstance(weight, nn.Parameter) and weight.dim() == 1 and not list(module.children())


def _has_router(skeleton: Skeleton, name: str) -> bool:
    """Whether the block mixes experts: its router reads what the experts read."""
    block = next(block for block in skeleton.blocks if name.startswith(f"{block}."))
    stacked = any(parameter.dim() > 2 for parameter in skeleton.model.get_submodule(block).parameters())
    return stacked or any(router.startswith(f"{block}.") for router in skeleton.routers)


def _unit_offset(norm: Any) -> float:
    """1 where the norm multiplies by `1 + weight`, found by giving it no weight at all."""
    x = torch.linspace(-1, 1, norm.weight.numel(), device=norm.weight.device, dtype=norm.weight.dtype)[None]
    kept = norm.weight.data
    norm.weight.data = torch.zeros_like(kept)
    output = norm(x) - (norm.bias if getattr(norm, "bias", None) is not None else 0)
    norm.weight.data = kept
    return 1.0 if output.abs().max() > 0 else 0.0


def _note_output(outputs: list[tuple[Tensor, str]], name: str) -> Callable[..., None]:
    def note(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if isinstance(output, Tensor):
            outputs.append((output, name))

    return note


def _note_input(outputs: list[tuple[Tensor, str]], trace: NormTrace, name: str) -> Callable[..., None]:
    def note(module: nn.Module, args: tuple[Any, ...]) -> None:
        found = next((norm for tensor, norm in outputs if args and args[0] is tensor), None)
        if found is not None:
            trace[name] = found

    return note
