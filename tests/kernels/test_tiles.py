"""The tile product, on a CPU without tiles: its instructions are emulated, everything around them is what AMX runs."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from serve.kernels import PackedLinear, build, library

COMPILER = os.environ.get("CXX") or shutil.which("g++")
HERE = Path(__file__).parent
TILE_MACROS = ("-D__AMX_TILE__", "-D__AMX_INT8__", "-D__AMX_BF16__")


@pytest.fixture(scope="module")
def tiles(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    if COMPILER is None:
        pytest.skip("no C++ compiler")
    output = tmp_path_factory.mktemp("tiles") / "emulated.so"
    flags = [*build._FLAGS, *(build._feature_flag(feature) for feature in build._VECTORS), *TILE_MACROS]
    source = build._SOURCES / "halftone.cpp"
    subprocess.run([COMPILER, *flags, "-include", HERE / "emulated_tiles.h", "-o", output, source], check=True)
    loaded = ctypes.CDLL(str(output))
    for name, (arguments, result) in library._SIGNATURES.items():
        function = getattr(loaded, name)
        function.argtypes, function.restype = arguments, result
    return loaded


@pytest.fixture(autouse=True)
def _use_tiles(tiles: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(library, "_loaded", lambda: tiles)
    library.team.cache_clear()
    yield
    library.team.cache_clear()


def packed(name: str, outputs: int, inputs: int) -> PackedLinear:
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(outputs, inputs, generator=generator).bfloat16()
    if name == "bf16":
        return PackedLinear.bf16(weight)
    if name == "int8":
        return PackedLinear.int8((weight.float() * 30).clamp(-127, 127).to(torch.int8), torch.ones(outputs))
    if name == "sparse":
        weight[weight.abs() < 0.7] = 0
        return PackedLinear.sparse(lambda rows: weight[rows], outputs, inputs)
    codes = torch.randint(0, 16, (outputs, inputs), dtype=torch.uint8, generator=generator)
    group = 64 if name == "code4" else 1024  # more than is unpacked at a time
    scales = torch.rand(outputs, -(-inputs // group), generator=generator)
    return PackedLinear.code4(codes, scales, None, torch.arange(16.0) - 8, group)


@pytest.mark.parametrize("name", ["bf16", "int8", "sparse", "code4", "code4, long groups"])
def test_tiles_and_vectors_give_the_same_product(
    name: str, tiles: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = torch.randn(70, 1100, generator=torch.Generator().manual_seed(2)).bfloat16()
    by_tiles = packed(name, 70, 1100)
    results = {rows: by_tiles(x[:rows]) for rows in (1, 7, 16, 17, 33, 70)}
    monkeypatch.undo()
    library.team.cache_clear()
    expected = packed(name, 70, 1100)(x)
    for rows, y in results.items():
        assert torch.equal(y, results[70][:rows])
        if name == "int8":
            assert torch.equal(y, expected[:rows])
        else:
            error = (y.float() - expected[:rows].float()).norm() / expected[:rows].float().norm()
            assert float(error) < 4e-3
