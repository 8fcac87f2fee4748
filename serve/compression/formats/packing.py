"""Integer codes of 2, 3, 4 or 8 bits, packed into bytes with no bit to spare.

64 rows of a weight form a block, stored column by column, so a matrix product reads it front to back. A code is cut
into planes whose width divides 8 (3 bits = 2 + 1). A plane of width w holds 8 * w bytes per column, and field j of
byte d belongs to row 8 * w * j + d. For 4 bits that is the very layout torch's AVX-512 kernel multiplies from,
so a saved artifact is mapped and used without a copy; with AVX2 the kernel's block is 32 rows.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

__all__ = ["BLOCK_ROWS", "PLANES", "kernel_block_rows", "pack", "packed_shape", "repack", "unpack"]

BLOCK_ROWS = 64  # what files hold, whatever machine wrote them
PLANES: dict[int, tuple[int, ...]] = {2: (2,), 3: (2, 1), 4: (4,), 8: (8,)}


def packed_shape(rows: int, columns: int, bits: int, block_rows: int = BLOCK_ROWS) -> tuple[int, int, int]:
    """Shape of the packed bytes: `[blocks, columns, block_rows * bits / 8]`. Zero rows pad the last."""
    return -(-rows // block_rows), columns, block_rows * bits // 8


def pack(codes: Tensor, bits: int, block_rows: int = BLOCK_ROWS) -> Tensor:
    """Pack `codes` (uint8 `[rows, columns]`, each below 2**bits) into bytes of `packed_shape`."""
    rows, columns = codes.shape
    blocks, _, width_bytes = packed_shape(rows, columns, bits, block_rows)
    padded = torch.nn.functional.pad(codes, (0, 0, 0, blocks * block_rows - rows))
    packed = torch.empty(blocks, columns, width_bytes, dtype=torch.uint8, device=codes.device)
    shift = first = 0
    for width in PLANES[bits]:
        fields = (padded >> shift) & (2**width - 1)
        fields = fields.view(blocks, 8 // width, block_rows * width // 8, columns)
        plane = functools.reduce(torch.bitwise_or, (fields[:, j] << (width * j) for j in range(8 // width)))
        packed[:, :, first : first + plane.shape[1]] = plane.transpose(1, 2)
        shift, first = shift + width, first + plane.shape[1]
    return packed


def unpack(packed: Tensor, bits: int) -> Tensor:
    """The codes of packed blocks, uint8 `[columns, blocks * block_rows]`: a weight transposed, ready for `x @ w`."""
    blocks, columns, width_bytes = packed.shape
    block_rows = width_bytes * 8 // bits
    codes = torch.empty(columns, blocks, block_rows, dtype=torch.uint8, device=packed.device)
    shift = first = 0
    for width in PLANES[bits]:
        plane_bytes = block_rows * width // 8
        plane = packed[:, :, first : first + plane_bytes].transpose(0, 1)
        for j in range(8 // width):
            field = (plane >> (width * j)) & (2**width - 1)
            rows = slice(j * plane_bytes, (j + 1) * plane_bytes)
            if shift:
                codes[:, :, rows] |= field << shift
            else:
                codes[:, :, rows] = field
        shift, first = shift + width, first + plane_bytes
    return codes.view(columns, blocks * block_rows)


def repack(packed: Tensor, rows: int, bits: int, block_rows: int) -> Tensor:
    """The same codes in blocks of another height."""
    return pack(unpack(packed, bits)[:, :rows].t().contiguous(), bits, block_rows)


@functools.cache
def kernel_block_rows() -> int | None:
    """Block height that torch's CPU int4 kernel reads, found by letting it pack a probe. None: another layout."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 16, (64, 32), dtype=torch.int32, generator=generator)
    theirs = torch._convert_weight_to_int4pack_for_cpu(codes, 1).flatten()
    for block_rows in (64, 32):
        if torch.equal(theirs, pack(codes.to(torch.uint8), 4, block_rows).flatten()):
            return block_rows
    return None
