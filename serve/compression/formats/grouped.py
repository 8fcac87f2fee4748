"""The integer format that round-to-nearest, GPTQ and AWQ share: packed codes, and a scale per row and group of columns.

`serve.compression.formats.integer_grid` says what the codes mean, `packing` how they lie in memory. One kernel per
format: our product where this CPU has `serve.kernels` and the activations are bf16, at every number of rows.
Elsewhere up to `KERNEL_BATCH` rows of activations go through torch's packed int4 product; more rows (and other widths,
group sizes and devices) through a bounded tile of unpacked rows and a GEMM. All multiply by

    (code - middle) * scale + offset,        offset = (middle - zero_point) * scale,  0 when symmetric

with scale and offset in the activations' type. The tile rounds that weight to the activations' type, the kernel keeps
it in float32: at 16 bits the two differ by about one rounding of the output.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from serve.compression.formats.integer_grid import GroupedWeight, IntegerGrid
from serve.compression.formats.linear import CompressedLinear, LinearSpec, Storage
from serve.compression.formats.packing import kernel_block_rows, pack, packed_shape, repack, unpack
from serve.kernels import PackedLinear

__all__ = ["KERNEL_BATCH", "GroupedLinear"]

KERNEL_BATCH = 64  # rows of activations from which unpacking and a GEMM overtake the packed product
_KERNEL_GROUPS = (256, 128, 64, 32)
_TILE_ROWS = {"cpu": 128, "cuda": 4096}  # of the weight, unpacked at once: in cache on a CPU, a full wave on a GPU


class GroupedLinear(CompressedLinear):
    """Plain layout: `codes` uint8 `[blocks, in, bytes]`, `scales [groups, out]` in the activations' dtype,
    `zero_points` uint8 `[groups, out]` unless symmetric, `permutation` int32 `[in]` where columns were brought
    together.
    """

    metadata: ClassVar[tuple[str, ...]] = ("scales", "zero_points", "permutation")
    codes: Tensor
    scales: Tensor
    zero_points: Tensor
    permutation: Tensor

    def __init__(self, spec: LinearSpec, grid: IntegerGrid, *, reordered: bool = False) -> None:
        super().__init__(spec)
        self.grid, self.reordered = grid, reordered
        groups = (grid.groups(spec.in_features), spec.out_features)
        self.declare("codes", packed_shape(spec.out_features, spec.in_features, grid.bits), torch.uint8)
        self.declare("scales", groups, spec.dtype)
        if not grid.symmetric:
            self.declare("zero_points", groups, torch.uint8)
        if reordered:
            self.declare("permutation", (spec.in_features,), torch.int32)
        self._plain = super().storage()
        self._kernel_grid: Tensor | None = None  # [kernel groups, padded rows, (scale, offset)]
        self._columns = grid.columns_per_group(spec.in_features)  # per group of the scales in use

    @classmethod
    def from_weight(cls, spec: LinearSpec, weight: GroupedWeight, bias: Tensor | None = None) -> GroupedLinear:
        """Pack `weight`; its scales must already have the type they are stored in, `spec.dtype`."""
        layer = cls(spec, weight.grid, reordered=weight.permutation is not None)
        layer.fill(
            codes=pack(weight.codes, weight.grid.bits),
            scales=weight.scales.contiguous(),
            zero_points=weight.zero_points,
            permutation=None if weight.permutation is None else weight.permutation.to(torch.int32),
            bias=bias,
        )
        return layer

    def to_weight(self) -> GroupedWeight:
        """The unpacked values, from the plain layout: for export and tests."""
        codes = unpack(self.codes, self.grid.bits)[:, : self.out_features].t().contiguous()
        zero_points = None if self.grid.symmetric else self.zero_points
        return GroupedWeight(
            self.grid, codes, self.scales, zero_points, self.permutation.long() if self.reordered else None
        )

    def storage(self) -> Storage:
        return self._plain

    @property
    def kernel(self) -> str:
        if self.packed is not None:
            return "int4 packed"
        tiled = f"int{self.grid.bits} tiles + GEMM"
        return tiled if self._kernel_grid is None else f"torch int4pack (tiles + GEMM above {KERNEL_BATCH} rows)"

    def dequantize(self) -> Tensor:
        return self.to_weight().dequantize()

    def reference(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.double()
        return F.linear(x.double(), self.to_weight().dequantize(torch.float64), bias).to(x.dtype)

    def _prepare(self) -> None:
        """Lay out scales and offsets as the kernel reads them, and codes as this machine packs them."""
        if self.packable and self.grid.bits == 4 and not self.reordered and self._columns % 32 == 0:
            self._prepare_tiles()
            return
        group, block_rows = self._kernel_group(), kernel_block_rows()
        if group is None or block_rows is None:
            return
        if self.codes.shape[2] * 2 != block_rows:
            self.codes = repack(self.codes, self.out_features, self.grid.bits, block_rows)
        scale, offset = self._scale_and_offset(slice(None))
        pair = torch.stack([scale, torch.zeros_like(scale) if offset is None else offset], dim=-1)
        pair = pair.repeat_interleave(self._columns // group, dim=0)[: self.in_features // group]
        padding = self.codes.shape[0] * block_rows - self.out_features
        self._kernel_grid, self._columns = F.pad(pair, (0, 0, 0, padding)).contiguous(), group
        self.scales = self.scales.new_empty(0)
        if not self.grid.symmetric:
            self.zero_points = self.zero_points.new_empty(0)

    def _prepare_tiles(self) -> None:
        symmetric = self.grid.symmetric
        levels = torch.arange(self.grid.levels) - (self.grid.middle if symmetric else 0)
        zeros = None if symmetric else self.zero_points.t().to(torch.bfloat16)
        scales = self.scales.t().to(torch.bfloat16)
        self.packed = PackedLinear.code4(
            self.codes, scales, zeros, levels, self._columns, self.bias, inputs=self.in_features, order="blocks"
        )
        for name in ("codes", "scales", "zero_points"):
            if name in self._buffers:
                setattr(self, name, getattr(self, name).new_empty(0))

    def _kernel_group(self) -> int | None:
        """Group size to call the packed kernel with, or None where it does not apply."""
        if self.codes.device.type != "cpu" or self.grid.bits != 4 or self.spec.dtype == torch.float64:
            return None
        return next((g for g in _KERNEL_GROUPS if self._columns % g == 0 and self.in_features % g == 0), None)

    def forward(self, x: Tensor) -> Tensor:
        if self.packed is not None and x.dtype is torch.bfloat16:
            return self.multiply_packed(self.packed, x)
        rows = x.reshape(-1, self.in_features)
        if self.reordered:
            rows = rows.index_select(1, self.permutation)
        small = self._kernel_grid is not None and 0 < rows.shape[0] <= KERNEL_BATCH
        y = self._packed(rows.contiguous()) if small else self._tiled(rows)
        if self.bias is not None:
            y += self.bias
        return y.reshape(*x.shape[:-1], self.out_features)

    def _packed(self, rows: Tensor) -> Tensor:
        assert self._kernel_grid is not None
        codes = self.codes.view(self._kernel_grid.shape[1], self.in_features // 2)
        y = torch._weight_int4pack_mm_for_cpu(rows, codes, self._columns, self._kernel_grid)
        return y[:, : self.out_features]

    def _tiled(self, rows: Tensor) -> Tensor:
        y = rows.new_empty(rows.shape[0], self.out_features)
        block_rows = self.codes.shape[2] * 8 // self.grid.bits
        step = max(1, _TILE_ROWS.get(rows.device.type, 128) // block_rows)
        for block in range(0, self.codes.shape[0], step):
            out = slice(block * block_rows, min((block + step) * block_rows, self.out_features))
            torch.mm(rows, self._tile(self.codes[block : block + step], out), out=y[:, out])
        return y

    def _tile(self, codes: Tensor, out: slice) -> Tensor:
        """Packed blocks as values, transposed: `[in_features, rows of out]`."""
        values = unpack(codes, self.grid.bits)[:, : out.stop - out.start].to(self.spec.dtype).sub_(self.grid.middle)
        scale, offset = self._scale_and_offset(out)
        if self.in_features % self._columns == 0:
            grouped = values.view(-1, self._columns, values.shape[1])
            _scale_in_place(grouped, scale[:, None], None if offset is None else offset[:, None])
        else:
            index = torch.arange(self.in_features, device=scale.device) // self._columns
            _scale_in_place(values, scale[index], None if offset is None else offset[index])
        return values

    def _scale_and_offset(self, out: slice) -> tuple[Tensor, Tensor | None]:
        """Of some rows: `[groups, rows]` each, in the activations' dtype; no offset when symmetric."""
        if self._kernel_grid is not None:
            pair = self._kernel_grid[:, out]
            return pair[..., 0], None if self.grid.symmetric else pair[..., 1]
        scale = self.scales[:, out]
        if self.grid.symmetric:
            return scale, None
        shift = self.grid.middle - self.zero_points[:, out].float()
        return scale, (shift * scale.float()).to(scale.dtype)


def _scale_in_place(values: Tensor, scale: Tensor, offset: Tensor | None) -> None:
    """values * scale + offset, rounded once."""
    if offset is None:
        values.mul_(scale)
    else:
        torch.addcmul(offset, values, scale, out=values)
