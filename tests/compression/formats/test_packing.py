"""Packed codes: no bit to spare, no code changed."""

from __future__ import annotations

import pytest
import torch

from serve.compression.formats.packing import kernel_block_rows, pack, packed_shape, repack, unpack


def _codes(rows: int, columns: int, bits: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rows * 1000 + columns + bits)
    return torch.randint(0, 2**bits, (rows, columns), dtype=torch.uint8, generator=generator)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(("rows", "columns"), [(64, 32), (1, 1), (63, 7), (65, 33), (130, 100), (16, 8)])
def test_codes_survive_packing(rows: int, columns: int, bits: int) -> None:
    codes = _codes(rows, columns, bits)
    packed = pack(codes, bits)
    assert packed.shape == packed_shape(rows, columns, bits)
    assert torch.equal(unpack(packed, bits)[:, :rows], codes.t())


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_no_bit_is_spare(bits: int) -> None:
    assert pack(_codes(128, 40, bits), bits).nbytes == 128 * 40 * bits // 8


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_another_block_height_holds_the_same_codes(bits: int) -> None:
    codes = _codes(100, 12, bits)
    narrow = repack(pack(codes, bits), 100, bits, 32)
    assert narrow.shape == packed_shape(100, 12, bits, 32)
    assert torch.equal(repack(narrow, 100, bits, 64), pack(codes, bits))


def test_four_bit_blocks_are_what_the_kernel_packs() -> None:
    block_rows = kernel_block_rows()
    if block_rows is None:
        pytest.skip("torch packs int4 in another layout on this machine")
    codes = _codes(192, 64, 4)
    theirs = torch._convert_weight_to_int4pack_for_cpu(codes.int(), 1)
    assert torch.equal(theirs.flatten(), pack(codes, 4, block_rows).flatten())
