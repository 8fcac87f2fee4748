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
from typing import Any

import torch
from torch import Tensor

from serve.compression.checkpoints import Checkpoint, Weights
from serve.compression.formats.grouped import GroupedLinear
from serve.compression.formats.integer_grid import GroupedWeight, IntegerGrid
from serve.compression.formats.linear import LinearSpec
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
    stage = _stage(settings, checkpoint)
    wanted = asked.quantizer
    if (wanted is not None and wanted.name != stage.name) or any(s.kind != "quantize" for s in asked.work):
        raise RecipeError(
            f"recipe {asked.name}: {checkpoint.folder} already holds {stage.name}; serve it as {stage.name} or bf16, "
            "or start from the uncompressed model"
        )
    if asked.lm_head != "keep":
        raise RecipeError(f"recipe {asked.name}: {checkpoint.folder} is compressed already, and its head is as it is")
    return Recipe(stages=(Dense(asked.dtype), stage))  # type: ignore[arg-type]


def _stage(settings: Mapping[str, Any], checkpoint: Checkpoint) -> Stage:
    try:
        stage = _described(settings, checkpoint)
    except (KeyError, TypeError, ValueError, RecipeError) as error:
        reason = f"lacks {error}" if isinstance(error, KeyError) else str(error)
        raise CheckpointError(f"{checkpoint.folder}: its quantization_config cannot be used ({reason})") from error
    if not _modules(checkpoint):
        raise CheckpointError(f"{checkpoint.folder}: config.json says {stage.name}, but no file holds such tensors")
    return stage


def _described(settings: Mapping[str, Any], checkpoint: Checkpoint) -> Stage:
    method = settings.get("quant_method")
    if method == "gptq":
        return _gptq_stage(settings, checkpoint)
    if method == "awq" and str(settings.get("version", "gemm")).lower() == "gemm":
        return Awq(settings["bits"], settings.get("group_size", 128), symmetric=not settings.get("zero_point", True))
    if method == "bitsandbytes" and settings.get("load_in_8bit"):
        return Int8()
    if method == "bitsandbytes" and settings.get("bnb_4bit_quant_type") == "nf4":
        states = (key for key in checkpoint.files if key.endswith(_NF4_STATE))
        state = _nf4_state(checkpoint, next(states, f"any {_NF4_STATE}"))
        return Nf4(int(state["blocksize"]), bool(settings.get("bnb_4bit_use_double_quant", False)))
    raise CheckpointError(
        f"{checkpoint.folder}: compressed with {method!r} in a form that cannot be read; "
        "GPTQ, AWQ (gemm) and bitsandbytes (NF4, 8-bit) can"
    )


def _gptq_stage(settings: Mapping[str, Any], checkpoint: Checkpoint) -> Gptq:
    rules = settings.get("dynamic") or {}  # those that begin with "-:" leave layers alone, which the file shows anyway
    if settings.get("lm_head") or any(not str(rule).startswith("-:") for rule in rules):
        raise CheckpointError(f"{checkpoint.folder}: GPTQ with a compressed head or layers of different settings")
    bits, group_size = int(settings["bits"]), int(settings["group_size"])
    modules = _modules(checkpoint)
    zeros = (_gptq_zeros(checkpoint, name, bits, settings) for name in modules)
    symmetric = all(bool((zero == 2 ** (bits - 1)).all()) for zero in zeros)
    orders = (_gptq_order(checkpoint, name) for name in modules)
    reordered = any(order is not None and not _is_natural(order, group_size) for order in orders)
    return Gptq(bits, group_size, symmetric, activation_order=reordered)


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
        self.modules = frozenset(_modules(self.checkpoint))
        unknown = self.modules - set(self.skeleton.projections)
        if unknown:
            raise CheckpointError(f"{self.checkpoint.folder}: {min(unknown)} is compressed, but no decoder projection")
        self.weights = Weights(self.checkpoint, self.skeleton.model, elsewhere=self.modules)

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
        checkpoint, settings = self.parts.checkpoint, self.parts.settings
        bias = checkpoint.read(f"{name}.bias").to(spec.dtype, copy=True) if spec.has_bias else None
        try:
            if isinstance(stage, Gptq):
                return _grouped(spec, _gptq_weight(checkpoint, name, stage, settings, spec), bias)
            if isinstance(stage, Awq):
                return _grouped(spec, _awq_weight(checkpoint, name, stage, spec), bias)
            tensors = _nf4(checkpoint, name, stage) if isinstance(stage, Nf4) else _int8(checkpoint, name)
        except (KeyError, RuntimeError, ValueError) as error:
            raise CheckpointError(f"{checkpoint.folder}: {name} cannot be read ({error})") from error
        return tensors | ({} if bias is None else {"bias": bias})


def _grouped(spec: LinearSpec, weight: GroupedWeight, bias: Tensor | None) -> dict[str, Tensor]:
    expected = (spec.out_features, spec.in_features)
    if weight.codes.shape != expected:
        raise CheckpointError(f"{spec.name}: holds {list(weight.codes.shape)}, the configuration says {list(expected)}")
    state: dict[str, Tensor] = GroupedLinear.from_weight(spec, weight, bias).state_dict()
    return state


def _gptq_weight(
    checkpoint: Checkpoint, name: str, stage: Gptq, settings: Mapping[str, Any], spec: LinearSpec
) -> GroupedWeight:
    codes = _unpack(checkpoint.read(f"{name}.qweight").t().contiguous(), stage.bits)
    order = None
    if stage.activation_order:
        index = _gptq_order(checkpoint, name)
        order = torch.arange(codes.shape[1]) if index is None else torch.argsort(index, stable=True)
        if index is not None and not _is_natural(index[order], stage.group_size):
            raise ValueError(f"g_idx has groups of other sizes than {stage.group_size}")
    zeros = None if stage.symmetric else _gptq_zeros(checkpoint, name, stage.bits, settings)
    return GroupedWeight(
        IntegerGrid(stage.bits, stage.group_size, stage.symmetric),
        codes if order is None else codes[:, order],
        checkpoint.read(f"{name}.scales").to(spec.dtype),
        zeros,
        order,
    )


def _gptq_order(checkpoint: Checkpoint, name: str) -> Tensor | None:
    """The group of each input, int64 `[in]`; some writers leave it out where groups are neighbours."""
    key = f"{name}.g_idx"
    return checkpoint.read(key).long() if key in checkpoint.files else None


def _gptq_zeros(checkpoint: Checkpoint, name: str, bits: int, settings: Mapping[str, Any]) -> Tensor:
    """Zero points uint8 `[groups, out]`; the older format stores them less one, modulo the number of levels."""
    zeros = _unpack(checkpoint.read(f"{name}.qzeros"), bits)
    second = settings.get("checkpoint_format", settings.get("format")) == "gptq_v2"
    return zeros if second else (zeros + 1) & (2**bits - 1)


def _awq_weight(checkpoint: Checkpoint, name: str, stage: Awq, spec: LinearSpec) -> GroupedWeight:
    if stage.bits != 4:
        raise CheckpointError(f"{name}: AWQ with {stage.bits} bits; only 4 can be read")
    codes = _in_order(_unpack(checkpoint.read(f"{name}.qweight"), 4)).t().contiguous()
    zeros = None if stage.symmetric else _in_order(_unpack(checkpoint.read(f"{name}.qzeros"), 4))
    grid = IntegerGrid(4, stage.group_size, stage.symmetric)
    return GroupedWeight(grid, codes, checkpoint.read(f"{name}.scales").to(spec.dtype), zeros)


def _in_order(codes: Tensor) -> Tensor:
    eights = codes.view(codes.shape[0], -1, 8).index_select(2, torch.tensor(_AWQ_ORDER))
    return eights.reshape(codes.shape)


def _nf4(checkpoint: Checkpoint, name: str, stage: Stage) -> dict[str, Tensor]:
    assert isinstance(stage, Nf4)
    read = checkpoint.read
    tensors = {"weight": read(f"{name}.weight").reshape(-1), "absmax": read(f"{name}.weight.absmax").reshape(-1)}
    if stage.double_quantization:
        state = _nf4_state(checkpoint, f"{name}.{_NF4_STATE}")
        tensors["absmax_scale"] = read(f"{name}.weight.nested_absmax").reshape(-1)
        tensors["absmax_code"] = read(f"{name}.weight.nested_quant_map")
        tensors["absmax_offset"] = torch.tensor(float(state["nested_offset"]))
    return {key: tensor.clone() for key, tensor in tensors.items()}


def _nf4_state(checkpoint: Checkpoint, key: str) -> dict[str, Any]:
    state: dict[str, Any] = json.loads(bytes(checkpoint.read(key).tolist()))
    return state


def _int8(checkpoint: Checkpoint, name: str) -> dict[str, Tensor]:
    return {"weight": checkpoint.read(f"{name}.weight").clone(), "scale": checkpoint.read(f"{name}.SCB").float() / 127}


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
