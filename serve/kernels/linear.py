"""A linear layer's weights in the kernels' layout: 32 output columns a panel, each panel one stream of memory.

One arithmetic per format, whatever the number of rows, and the sum over a row never depends on the rows beside it:

    bf16    products of bf16 summed in fp32
    int8    activations in 8 bits per token, exact integer sums, then both scales
    code4   the code's value in bf16, products summed in fp32 per group, then the group's scale
    sparse  bf16 with the zeros left out: a bit per weight says where they were

`reference` is the same by plain torch.
"""

from __future__ import annotations

from collections.abc import Callable
from ctypes import byref
from typing import Literal

import torch
from torch import Tensor

from serve.kernels.library import Linear, address, library, team
from serve.kernels.memory import allocate

__all__ = ["CodeOrder", "PackedLinear"]

CodeOrder = Literal["bytes", "pairs", "blocks"]
_ORDERS = ("bytes", "pairs", "blocks")  # as csrc/packing.h counts them

_PANEL = 32
_BF16, _INT8, _CODE4, _SPARSE = range(4)
_LINE = 32  # numbers that share a mask, and how far past the last number the kernel reads


class PackedLinear:
    """`y = x W^T + b` for `x [rows, inputs]` in bf16. Owns its tensors; `spec` points into them."""

    def __init__(self, spec: Linear, tensors: dict[str, Tensor]) -> None:
        self.spec = spec
        self._tensors = tensors
        for name, tensor in tensors.items():
            setattr(spec, name, address(tensor))

    @classmethod
    def bf16(cls, weight: Tensor, bias: Tensor | None = None) -> PackedLinear:
        """weight: bf16 `[outputs, inputs]`."""
        spec = Linear(format=_BF16, outputs=weight.shape[0], inputs=weight.shape[1])
        return cls(spec, {"weight": _pack(spec, weight, torch.bfloat16), **_bias(bias)})

    @classmethod
    def int8(cls, weight: Tensor, scale: Tensor, bias: Tensor | None = None) -> PackedLinear:
        """weight: int8 `[outputs, inputs]`; scale: float32 `[outputs]`."""
        spec = Linear(format=_INT8, outputs=weight.shape[0], inputs=weight.shape[1])
        offset = weight.sum(dim=1, dtype=torch.int32).mul_(128)
        tensors = {"weight": _pack(spec, weight, torch.int8), "scale": scale.contiguous().float(), "offset": offset}
        return cls(spec, {**tensors, **_bias(bias)})

    @classmethod
    def code4(
        cls,
        codes: Tensor,
        scales: Tensor,
        zeros: Tensor | None,
        levels: Tensor,
        group_size: int,
        bias: Tensor | None = None,
        *,
        inputs: int | None = None,
        order: CodeOrder = "bytes",
    ) -> PackedLinear:
        """`weight[o, i] = scales[o, g] * (levels[codes[o, i]] - zeros[o, g])`, g = i // group_size.

        codes: uint8, in one of three orders: "bytes", `[outputs, inputs]`; "pairs", two a byte, row after row, the
        first in the high half (bitsandbytes); "blocks", `[blocks, inputs, 32]`, 64 rows a block with rows d and d + 32
        in a byte. inputs: where the codes' shape does not say. scales, zeros: bf16 or float32 `[outputs, groups]`;
        levels: 16 values that bf16 holds. Raises ValueError for a group size that is no multiple of 32.
        """
        if group_size % 32:
            raise ValueError(f"groups of {group_size} do not fill whole tiles of 32 inputs")
        half = scales.dtype == torch.bfloat16
        inputs = inputs or codes.shape[1]
        spec = Linear(format=_CODE4, outputs=len(scales), inputs=inputs, group=group_size, half_scales=half)
        nearest_zero = int(levels.float().abs().argmin()) if zeros is None else 0
        packed = allocate(library().ht_packed_bytes(byref(spec)))
        codes = codes.contiguous()
        source = address(codes, torch.uint8), _ORDERS.index(order)
        library().ht_pack_codes(_team(), byref(spec), *source, nearest_zero, address(packed))
        tensors = {"weight": packed, "scale": _by_panel(scales), "table": levels.to(torch.bfloat16).contiguous()}
        if zeros is not None:
            tensors["offset"] = _by_panel(zeros.to(scales.dtype))
        return cls(spec, {**tensors, **_bias(bias)})

    @classmethod
    def sparse(
        cls, rows: Callable[[slice], Tensor], outputs: int, inputs: int, bias: Tensor | None = None
    ) -> PackedLinear:
        """`rows(slice)` gives that part of the weight with its zeros, bf16 `[rows, inputs]`, a panel at a time."""
        spec = Linear(format=_SPARSE, outputs=outputs, inputs=inputs)
        bits = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8)
        values: list[Tensor] = []
        masks: list[Tensor] = []
        for at in range(0, outputs, _PANEL):
            lines = _lines(rows(slice(at, min(at + _PANEL, outputs))))
            kept = lines != 0
            values.append(lines[kept])
            masks.append((kept.view(-1, 8) * bits).sum(1, dtype=torch.uint8))
        starts = torch.tensor([0, *(len(part) for part in values)])[:-1].cumsum(0)
        stream = allocate(2 * (sum(len(part) for part in values) + _LINE)).view(torch.bfloat16)
        torch.cat(values, out=stream[:-_LINE])
        return cls(spec, {"weight": stream, "scale": torch.cat(masks), "offset": starts, **_bias(bias)})

    def __call__(self, x: Tensor) -> Tensor:
        """x: bf16 `[rows, inputs]`; returns bf16 `[rows, outputs]`."""
        y = x.new_empty(x.shape[0], self.spec.outputs)
        if len(x):
            x = x.contiguous()
            library().ht_linear(_team(), byref(self.spec), address(x, torch.bfloat16), len(x), address(y))
        return y

    def unpacked(self) -> Tensor:
        """The bf16 or int8 weight that was packed, `[outputs, inputs]`."""
        assert self.spec.format in (_BF16, _INT8)
        dtype = torch.int8 if self.spec.format == _INT8 else torch.bfloat16
        weight = torch.empty(self.spec.outputs, self.spec.inputs, dtype=dtype)
        library().ht_unpack(byref(self.spec), address(weight))
        return weight

    @property
    def nbytes(self) -> int:
        """Everything that it holds."""
        return sum(tensor.nbytes for tensor in self._tensors.values())


def _pack(spec: Linear, weight: Tensor, dtype: torch.dtype) -> Tensor:
    packed = allocate(library().ht_packed_bytes(byref(spec)))
    weight = weight.contiguous()
    library().ht_pack(_team(), byref(spec), address(weight, dtype), address(packed))
    return packed


def _team() -> int:
    return team(torch.get_num_threads())


def _lines(rows: Tensor) -> Tensor:
    """Up to 32 rows of a bf16 weight in the order in which bf16 is packed: `[lines, 32]`, padded with zeros."""
    inputs = -(-rows.shape[1] // _LINE) * _LINE
    padded = rows.new_zeros(_PANEL, inputs)
    padded[: rows.shape[0], : rows.shape[1]] = rows
    return padded.view(_PANEL, inputs // 2, 2).transpose(0, 1).reshape(-1, _LINE)


def _bias(bias: Tensor | None) -> dict[str, Tensor]:
    return {} if bias is None else {"bias": bias.detach().float().contiguous()}


def _by_panel(values: Tensor) -> Tensor:
    """`[outputs, groups]` to `[panels, groups, 32]`, padded with zeros."""
    outputs, groups = values.shape
    panels = -(-outputs // _PANEL)
    padded = values.new_zeros(panels * _PANEL, groups)
    padded[:outputs] = values
    return padded.view(panels, _PANEL, groups).transpose(1, 2).contiguous()
