"""Checkpoints that others compressed: GPTQ, AWQ and bitsandbytes files, read into our own formats as they are.

Nothing is rounded again: the stored integers are repacked, and only scales change type. What each writer calls its
tensors:

    GPTQ   qweight int32 [in * bits / 32, out], qzeros int32 [groups, out * bits / 32], scales [groups, out],
           g_idx [in]; AutoGPTQ ("v1") stores zero - 1, "gptq_v2" stores zero itself
    AWQ    qweight int32 [in, out * bits / 32], qzeros and scales alike; an int32 holds neighbours 0 2 4 6 1 3 5 7
    NF4    weight uint8 [out * in / 2, 1], weight.absmax and friends, and a JSON of the rest as bytes
    INT8   weight int8 [out, in], SCB float32 [out]
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from serve.compression.checkpoints import Checkpoint, Weights
from serve.compression.foreign_settings import ForeignSettings, read_settings
from serve.compression.foreign_tensors import FLOATS, missing, read_tensor
from serve.compression.formats.grouped import GroupedLinear
from serve.compression.formats.integer_grid import GroupedWeight, IntegerGrid
from serve.compression.formats.linear import LinearSpec
from serve.compression.formats.nf4 import LEVELS
from serve.compression.plan import Plan
from serve.compression.recipe import Recipe
from serve.compression.restore import REST
from serve.compression.skeleton import Skeleton
from serve.compression.stages import Awq, Dense, Gptq, Int8, Nf4, Stage
from serve.errors import CheckpointError, RecipeError

__all__ = ["ForeignParts", "stored_recipe"]

_AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)  # where each of eight neighbours lies within an int32
_NF4_STATE = "weight.quant_state.bitsandbytes__nf4"
_MARKS = ("qweight", "SCB", _NF4_STATE)


def stored_recipe(settings: Mapping[str, Any], checkpoint: Checkpoint, asked: Recipe) -> Recipe:
    """The recipe that the checkpoint went through. Raise where it cannot be read, or another one is asked for.

    A 16- or 32-bit recipe asks for the checkpoint as it is, with activations of that type.
    """
    try:
        stage = _stage(read_settings(settings, checkpoint.folder), checkpoint)
    except RecipeError as error:
        raise CheckpointError(f"{checkpoint.folder}: config.json: quantization_config: {error}") from error
    wanted = asked.quantizer
    if (wanted is not None and wanted.name != stage.name) or any(s.kind != "quantize" for s in asked.work):
        raise RecipeError(
            f"recipe {asked.name}: {checkpoint.folder} already holds {stage.name}; serve it as {stage.name} or bf16, "
            "or start from the uncompressed model"
        )
    if asked.lm_head != "keep":
        raise RecipeError(f"recipe {asked.name}: {checkpoint.folder} is compressed already, and its head is as it is")
    return Recipe(stages=(Dense(asked.dtype), stage))  # type: ignore[arg-type]


def _stage(settings: ForeignSettings, checkpoint: Checkpoint) -> Stage:
    modules = _modules(checkpoint)
    if not modules:
        raise CheckpointError(
            f"{checkpoint.folder}: config.json says {settings.method}, but no file holds such tensors; is the download "
            "complete?"
        )
    if settings.method == "int8":
        return Int8()
    if settings.method == "awq":
        return Awq(settings.bits, settings.group_size, symmetric=not settings.asymmetric)
    if settings.method == "nf4":
        state = _nf4_state(checkpoint, modules[0])
        return Nf4(state.block_size, settings.double_quantization)
    middle = 2 ** (settings.bits - 1)
    symmetric = all(bool((_gptq_zeros(checkpoint, name, settings) == middle).all()) for name in modules)
    orders = (_gptq_order(checkpoint, name) for name in modules)
    reordered = any(order is not None and not _is_natural(order, settings.group_size) for order in orders)
    return Gptq(settings.bits, settings.group_size, symmetric, activation_order=reordered)


def _modules(checkpoint: Checkpoint) -> list[str]:
    """Names of the compressed modules, as the file spells them."""
    found = {key.removesuffix(f".{mark}") for key in checkpoint.files for mark in _MARKS if key.endswith(f".{mark}")}
    return sorted(found)


@dataclass
class ForeignParts:
    """Reads a foreign checkpoint part by part in our plain layout, as `restore` wants it."""

    skeleton: Skeleton
    checkpoint: Checkpoint
    settings: Mapping[str, Any]

    def __post_init__(self) -> None:
        self.read_settings = read_settings(self.settings, self.checkpoint.folder)
        self.modules = frozenset(_modules(self.checkpoint))
        unknown = self.modules - set(self.skeleton.projections)
        if unknown:
            raise CheckpointError(f"{self.checkpoint.folder}: {min(unknown)} is compressed, but no decoder projection")
        self._check_halves()
        self.weights = Weights(self.checkpoint, self.skeleton.model, elsewhere=self.modules)

    def _check_halves(self) -> None:
        """A layer that lacks the tensor by which it is known would be read as if it were not compressed at all."""
        for name in self.skeleton.projections:
            if name in self.modules:
                continue
            for mark, companion in (("qweight", "qzeros"), ("qweight", "scales"), (_NF4_STATE, "weight.absmax")):
                if f"{name}.{companion}" in self.checkpoint.files:
                    raise missing(self.checkpoint, f"{name}.{mark}")
            key = f"{name}.weight"
            if key in self.checkpoint.files and not self.checkpoint.read(key).is_floating_point():
                raise missing(
                    self.checkpoint, f"{name}.SCB" if self.read_settings.method == "int8" else f"{name}.qweight"
                )

    @property
    def dense(self) -> tuple[str, ...]:
        """Projections that the writer left alone."""
        return tuple(name for name in self.skeleton.projections if name not in self.modules)

    def reader(self, plan: Plan) -> _Reader:
        return _Reader(self, plan)


@dataclass
class _Reader:
    parts: ForeignParts
    plan: Plan

    def read(self, part: str) -> dict[str, Tensor]:
        skeleton, weights = self.parts.skeleton, self.parts.weights
        inside = tuple(f"{block}." for block in skeleton.blocks) if part == REST else (f"{part}.",)
        tensors: dict[str, Tensor] = {}
        for name, _ in skeleton.model.named_parameters():
            module = name.rpartition(".")[0]
            if name.startswith(inside) == (part == REST) or module in self.parts.modules:
                continue
            tensors[name] = weights.read(name).to(skeleton.dtype_of(name), copy=True)
        for module in self.parts.modules:
            if part != REST and module.startswith(f"{part}."):
                tensors |= {f"{module}.{key}": tensor for key, tensor in self._layer(module).items()}
        return tensors

    def _layer(self, name: str) -> dict[str, Tensor]:
        """One module in our plain layout."""
        stage, spec = self.plan.recipe.quantizer, self.parts.skeleton.spec(name)
        checkpoint, settings = self.parts.checkpoint, self.parts.read_settings
        bias = None
        if spec.has_bias:
            bias = read_tensor(checkpoint, f"{name}.bias", FLOATS, (spec.out_features,)).to(spec.dtype, copy=True)
        if isinstance(stage, Gptq):
            return _grouped(spec, _gptq_weight(checkpoint, name, stage, settings, spec), bias)
        if isinstance(stage, Awq):
            return _grouped(spec, _awq_weight(checkpoint, name, stage, spec), bias)
        tensors = _nf4(checkpoint, name, stage, spec) if isinstance(stage, Nf4) else _int8(checkpoint, name, spec)
        return tensors | ({} if bias is None else {"bias": bias})


def _grouped(spec: LinearSpec, weight: GroupedWeight, bias: Tensor | None) -> dict[str, Tensor]:
    expected = (spec.out_features, spec.in_features)
    if weight.codes.shape != expected:
        raise CheckpointError(f"{spec.name}: holds {list(weight.codes.shape)}, the configuration says {list(expected)}")
    state: dict[str, Tensor] = GroupedLinear.from_weight(spec, weight, bias).state_dict()
    return state


def _words(codes: int, bits: int) -> int:
    """How many int32 hold so many codes."""
    return -(-codes * bits // 32)


def _gptq_weight(
    checkpoint: Checkpoint, name: str, stage: Gptq, settings: ForeignSettings, spec: LinearSpec
) -> GroupedWeight:
    grid = IntegerGrid(stage.bits, stage.group_size, stage.symmetric)
    columns, rows, groups = spec.in_features, spec.out_features, grid.groups(spec.in_features)
    packed = read_tensor(checkpoint, f"{name}.qweight", (torch.int32,), (_words(columns, stage.bits), rows))
    codes = _unpack(packed.t().contiguous(), stage.bits)
    order = None
    index = _gptq_order(checkpoint, name, columns)
    if stage.activation_order:
        order = torch.arange(columns) if index is None else torch.argsort(index, stable=True)
        if index is not None and not _is_natural(index[order], stage.group_size):
            raise CheckpointError(
                f"{checkpoint.folder}: tensor {name}.g_idx has groups of other sizes than quantization_config."
                f"group_size {stage.group_size}; correct config.json, or start from the uncompressed model"
            )
    read_tensor(checkpoint, f"{name}.qzeros", (torch.int32,), (groups, _words(rows, stage.bits)))
    zeros = None if stage.symmetric else _gptq_zeros(checkpoint, name, settings)
    scales = read_tensor(checkpoint, f"{name}.scales", FLOATS, (groups, rows)).to(spec.dtype)
    return GroupedWeight(grid, codes if order is None else codes[:, order], scales, zeros, order)


def _gptq_order(checkpoint: Checkpoint, name: str, columns: int | None = None) -> Tensor | None:
    """The group of each input, int64 `[in]`; some writers leave it out where groups are neighbours."""
    key = f"{name}.g_idx"
    if key not in checkpoint.files:
        return None
    return read_tensor(checkpoint, key, (torch.int32, torch.int64), (columns,)).long()


def _gptq_zeros(checkpoint: Checkpoint, name: str, settings: ForeignSettings) -> Tensor:
    """Zero points uint8 `[groups, out]`; the older format stores them less one, modulo the number of levels."""
    zeros = _unpack(read_tensor(checkpoint, f"{name}.qzeros", (torch.int32,), (None, None)), settings.bits)
    return (zeros + 1) & (2**settings.bits - 1) if settings.zeros_less_one else zeros


def _awq_weight(checkpoint: Checkpoint, name: str, stage: Awq, spec: LinearSpec) -> GroupedWeight:
    grid = IntegerGrid(stage.bits, stage.group_size, stage.symmetric)
    columns, rows, groups = spec.in_features, spec.out_features, grid.groups(spec.in_features)
    words = _words(rows, stage.bits)
    packed = read_tensor(checkpoint, f"{name}.qweight", (torch.int32,), (columns, words))
    codes = _in_order(_unpack(packed, stage.bits)).t().contiguous()
    zeros = None
    if not stage.symmetric:
        stored = read_tensor(checkpoint, f"{name}.qzeros", (torch.int32,), (groups, words))
        zeros = _in_order(_unpack(stored, stage.bits))
    return GroupedWeight(
        grid, codes, read_tensor(checkpoint, f"{name}.scales", FLOATS, (groups, rows)).to(spec.dtype), zeros
    )


def _in_order(codes: Tensor) -> Tensor:
    eights = codes.view(codes.shape[0], -1, 8).index_select(2, torch.tensor(_AWQ_ORDER))
    return eights.reshape(codes.shape)


@dataclass(frozen=True)
class _Nf4State:
    """What bitsandbytes writes beside a layer: JSON in bytes."""

    block_size: int
    offset: float


def _nf4_state(checkpoint: Checkpoint, name: str) -> _Nf4State:
    key = f"{name}.{_NF4_STATE}"
    try:
        state = json.loads(bytes(read_tensor(checkpoint, key, (torch.uint8,), (None,)).tolist()))
        return _Nf4State(int(state["blocksize"]), float(state.get("nested_offset") or 0))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{checkpoint.folder}: tensor {key} is no description of an NF4 layer ({error}); download it again"
        ) from error


def _nf4(checkpoint: Checkpoint, name: str, stage: Nf4, spec: LinearSpec) -> dict[str, Tensor]:
    state, count = _nf4_state(checkpoint, name), spec.in_features * spec.out_features
    if state.block_size != stage.block_size:
        raise CheckpointError(
            f"{checkpoint.folder}: {name} has NF4 blocks of {state.block_size} values, others of {stage.block_size}; "
            "one size can be read: start from the uncompressed model"
        )
    blocks = -(-count // stage.block_size)
    double = stage.double_quantization
    read = partial(read_tensor, checkpoint)
    levels = f"{name}.weight.quant_map"
    if levels in checkpoint.files and not torch.allclose(read(levels, (torch.float32,), (16,)), torch.tensor(LEVELS)):
        raise CheckpointError(
            f"{checkpoint.folder}: tensor {levels} has other levels than NF4; start from the original"
        )
    tensors = {
        "weight": read(f"{name}.weight", (torch.uint8,)).reshape(-1),
        "absmax": read(f"{name}.weight.absmax", (torch.uint8 if double else torch.float32,), (blocks,)),
    }
    if double:
        tensors["absmax_scale"] = read(f"{name}.weight.nested_absmax", (torch.float32,)).reshape(-1)
        tensors["absmax_code"] = read(f"{name}.weight.nested_quant_map", (torch.float32,), (256,))
        tensors["absmax_offset"] = torch.tensor(state.offset)
    return {key: tensor.clone() for key, tensor in tensors.items()}


def _int8(checkpoint: Checkpoint, name: str, spec: LinearSpec) -> dict[str, Tensor]:
    weight = read_tensor(checkpoint, f"{name}.weight", (torch.int8,), (spec.out_features, spec.in_features))
    largest = read_tensor(checkpoint, f"{name}.SCB", FLOATS, (spec.out_features,))
    return {"weight": weight.clone(), "scale": largest.float() / 127}


def _unpack(packed: Tensor, bits: int) -> Tensor:
    """int32 `[rows, words]` to uint8 `[rows, words * 32 / bits]`, lowest bits first; a code may span two words."""
    words = packed.to(torch.int64) & 0xFFFFFFFF
    per_row = words.shape[1] * 32 // bits
    first = torch.arange(per_row) * bits
    low = words[:, first // 32] >> (first % 32)
    following = torch.nn.functional.pad(words, (0, 1))[:, first // 32 + 1]
    high = torch.where(first % 32 + bits > 32, following << (32 - first % 32), torch.zeros_like(low))
    codes: Tensor = (low | high) & (2**bits - 1)
    return codes.to(torch.uint8)


def _is_natural(index: Tensor, group_size: int) -> bool:
    columns = index.numel() if group_size == -1 else group_size
    return bool((index == torch.arange(index.numel()) // columns).all())
