"""Cutting a model before anything else is done to it: fewer attention heads and MLP channels, or fewer layers.

What is left is an ordinary checkpoint of a smaller model, as large as `serve.compression.sizes` says, which any later
stage then compresses. Which parts go is chosen on calibration text, block after block, each seeing what the cut blocks
before it produce. `serve.compression.methods.structured` has the mathematics.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PretrainedConfig

from serve.compression.activations import BlockActivations
from serve.compression.compress import NoNotes, Notes, Progress, Reader
from serve.compression.method import Need
from serve.compression.methods.quantizers import gram_of
from serve.compression.methods.structured import choose_parts, part_columns, refit
from serve.compression.restore import move_buffers
from serve.compression.skeleton import Skeleton, set_tensor
from serve.errors import CompressionError, UnsupportedArchitecture

__all__ = ["CutWeights", "cut"]

_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@torch.no_grad()
def cut(
    skeleton: Skeleton,
    weights: Reader,
    smaller: PretrainedConfig,
    activations: BlockActivations,
    progress: Progress,
    notes: Notes | None = None,
) -> CutWeights:
    """Choose what stays of the empty `skeleton` at the size that `smaller` has, which differs in depth or in width.

    Its blocks are filled and emptied again one after another. What `notes` has of a block is not chosen again.
    """
    notes = notes or NoNotes()
    inside = tuple(f"{block}." for block in skeleton.blocks)
    outside = [name for name, _ in skeleton.model.named_parameters() if not name.startswith(inside)]
    _fill(skeleton, weights, outside, activations.device)
    move_buffers(skeleton.model, activations.device)
    count = smaller.get_text_config(decoder=True).num_hidden_layers
    if count < len(skeleton.blocks):
        return _choose_layers(skeleton, weights, count, activations, progress)
    return _choose_width(skeleton, weights, smaller, activations, progress, notes)


class CutWeights:
    """A checkpoint's tensors as the cut model names them. Those that changed lie in temporary files, not in memory."""

    def __init__(self, weights: Reader, renamed: Mapping[str, str] | None = None) -> None:
        self._weights, self._renamed = weights, dict(renamed or {})
        self._changed: dict[str, Any] = {}  # parameter -> open file
        self.tied, self.unused_keys = weights.tied, weights.unused_keys

    def put(self, tensors: Mapping[str, Tensor]) -> None:
        """Keep changed tensors until they are read."""
        if not tensors:
            return
        with tempfile.TemporaryDirectory(prefix="halftone-cut-") as folder:
            file = Path(folder) / "changed.safetensors"
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file)
            opened = safe_open(file, framework="pt", device="cpu")  # the map outlives the name, and ends with self
        self._changed |= dict.fromkeys(tensors, opened)

    def read(self, name: str) -> Tensor:
        """The values of a parameter; mapped from a file."""
        name = self.tied.get(name, name)
        if name in self._changed:
            return cast(Tensor, self._changed[name].get_tensor(name))
        block = next((block for block in self._renamed if name.startswith(f"{block}.")), None)
        return self._weights.read(name if block is None else self._renamed[block] + name.removeprefix(block))


def _choose_layers(
    skeleton: Skeleton, weights: Reader, count: int, activations: BlockActivations, progress: Progress
) -> CutWeights:
    influence: dict[str, float] = {}
    for done, block in enumerate(skeleton.blocks):
        progress("measure layers", done, len(skeleton.blocks))
        with _filled(skeleton, weights, block, activations.device):
            influence[block] = activations.influence(block)
        if not isfinite(influence[block]):
            raise CompressionError(f"{block}: its outputs contain NaN or infinity; calibrate in float32")
    best = sorted(influence, key=lambda block: -influence[block])[:count]
    kept = [block for block in influence if block in best]
    return CutWeights(weights, dict(zip(list(influence)[:count], kept, strict=True)))


def _choose_width(
    skeleton: Skeleton,
    weights: Reader,
    smaller: PretrainedConfig,
    activations: BlockActivations,
    progress: Progress,
    notes: Notes,
) -> CutWeights:
    sizes = _Sizes.of(skeleton.model.config), _Sizes.of(smaller)
    result = CutWeights(weights)
    for done, block in enumerate(skeleton.blocks):
        progress("cut", done, len(skeleton.blocks))
        names = _projections(skeleton, block)
        with _filled(skeleton, weights, block, activations.device):
            for reader, keep in sizes[0].readers(sizes[1]):
                changed = _cut_parts(skeleton, weights, block, names, reader, keep, activations, notes)
                result.put(changed)
            activations.advance(block)
    return result


@dataclass(frozen=True)
class _Reader:
    """The projection that reads the parts: `width` of its inputs each, from that many rows of each producer."""

    name: str
    parts: int
    width: int
    producers: dict[str, int]


@dataclass(frozen=True)
class _Sizes:
    """What a block of the usual kind is made of."""

    heads: int
    shared: int
    width: int
    channels: int

    @classmethod
    def of(cls, config: PretrainedConfig) -> _Sizes:
        text: Any = config.get_text_config(decoder=True)
        heads: int = text.num_attention_heads
        width = getattr(text, "head_dim", None) or text.hidden_size // heads
        return cls(heads, getattr(text, "num_key_value_heads", None) or heads, width, text.intermediate_size)

    def readers(self, smaller: _Sizes) -> list[tuple[_Reader, int]]:
        """The two cuts of a block and how many parts stay; attention first, for the MLP sees what it produces."""
        group = self.heads // self.shared * self.width
        attention = {"q_proj": group, "k_proj": self.width, "v_proj": self.width}
        return [
            (_Reader("o_proj", self.shared, group, attention), smaller.shared),
            (_Reader("down_proj", self.channels, 1, {"gate_proj": 1, "up_proj": 1}), smaller.channels),
        ]


def _cut_parts(
    skeleton: Skeleton,
    weights: Reader,
    block: str,
    names: Mapping[str, str],
    reader: _Reader,
    keep: int,
    activations: BlockActivations,
    notes: Notes,
) -> dict[str, Tensor]:
    """Cut in the file's type, and leave the block at its old size but computing the same."""
    name = names[reader.name]
    if keep == reader.parts:
        return {}
    measured = activations.measure(block, [name], Need.GRAM)
    gram = gram_of(measured.get(name), name)
    stored = weights.read(f"{name}.weight")
    weight = stored.to(gram.device, torch.float32)
    known = notes.recall(note := f"cut-{name}")
    if known is None:
        parts = choose_parts(weight, gram, reader.width, keep, name=name)
        notes.remember(note, {"kept": parts.tolist()})
    else:
        parts = torch.tensor(known["kept"], device=gram.device)
    columns = part_columns(parts, reader.width)
    fitted = refit(weight, gram, columns, name=name)
    dense: Any = skeleton.model.get_submodule(name)
    dense.weight.data.zero_()[:, columns] = fitted.to(dense.weight.dtype)
    changed = {f"{name}.weight": fitted.to("cpu", stored.dtype)}
    for producer, width in reader.producers.items():
        rows = part_columns(parts, width).cpu()
        for parameter in _parameters(skeleton, names[producer]):
            changed[parameter] = weights.read(parameter)[rows]
    return changed


def _projections(skeleton: Skeleton, block: str) -> dict[str, str]:
    """The block's projections by their last name; raise `UnsupportedArchitecture` unless they are the usual seven."""
    names = [name for name in skeleton.projections if name.startswith(f"{block}.")]
    found = {name.rpartition(".")[2]: name for name in names}
    if sorted(found) != sorted(_PROJECTIONS) or len(names) != len(found):
        kind = type(skeleton.model).__name__
        raise UnsupportedArchitecture(
            f"{kind}: structured pruning knows blocks of {', '.join(_PROJECTIONS)}; use depth pruning"
        )
    return found


def _parameters(skeleton: Skeleton, module: str) -> list[str]:
    return [name for name, _ in skeleton.model.get_submodule(module).named_parameters(module)]


def _fill(skeleton: Skeleton, weights: Reader, names: Sequence[str], device: torch.device) -> None:
    for name in names:
        set_tensor(skeleton.model, name, weights.read(name).to(device, skeleton.dtype_of(name), copy=True))


@contextmanager
def _filled(skeleton: Skeleton, weights: Reader, block: str, device: torch.device) -> Iterator[None]:
    """The block has its weights inside, and none afterwards."""
    names = _parameters(skeleton, block)
    _fill(skeleton, weights, names, device)
    yield
    for name in names:
        set_tensor(skeleton.model, name, skeleton.model.get_parameter(name).to("meta"))
