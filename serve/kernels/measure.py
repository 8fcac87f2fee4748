"""How fast each format's product runs on this machine: bytes read at one row, operations per second at many.

Weights are read in turn from more memory than the caches hold, as a step does. Close other programs first.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from serve.kernels.linear import PackedLinear

__all__ = ["measure"]

_OUTPUTS, _INPUTS = 8192, 2048
_WEIGHTS_BYTES = 256 * 2**20
_ROWS = (1, 8, 16, 128)
_REPEATS = 5


def measure(threads: int) -> Iterator[str]:
    """One line per format: GB/s of weights at one row, then billions of operations per second by number of rows."""
    torch.set_num_threads(threads)
    yield f"{'format':8s}" + "".join(f"{rows:>6d} rows" for rows in _ROWS) + "   GB/s at 1 row"
    for name, make in _FORMATS.items():
        first = make()
        layers = [first, *(make() for _ in range(_WEIGHTS_BYTES // first.nbytes))]
        seconds = [_seconds(layers, rows) for rows in _ROWS]
        speeds = (2 * rows * _OUTPUTS * _INPUTS / s / 1e9 for rows, s in zip(_ROWS, seconds, strict=True))
        yield f"{name:8s}" + "".join(f"{speed:11.0f}" for speed in speeds) + f"{first.nbytes / seconds[0] / 1e9:16.1f}"


def _seconds(layers: list[PackedLinear], rows: int) -> float:
    """Of one product, the median over rounds through all layers."""
    x = torch.randn(rows, _INPUTS).bfloat16()
    rounds = []
    for _ in range(1 + _REPEATS):
        start_s = time.perf_counter()
        for layer in layers:
            layer(x)
        rounds.append((time.perf_counter() - start_s) / len(layers))
    return statistics.median(rounds[1:])


def _dense() -> Tensor:
    return torch.randn(_OUTPUTS, _INPUTS).bfloat16()


def _int8() -> PackedLinear:
    return PackedLinear.int8(torch.randint(-127, 128, (_OUTPUTS, _INPUTS), dtype=torch.int8), torch.ones(_OUTPUTS))


def _code4(group_size: int) -> PackedLinear:
    codes = torch.randint(0, 16, (_OUTPUTS, _INPUTS), dtype=torch.uint8)
    scales = torch.ones(_OUTPUTS, _INPUTS // group_size, dtype=torch.bfloat16)
    return PackedLinear.code4(codes, scales, None, torch.arange(16.0) - 8, group_size)


_FORMATS: dict[str, Callable[[], PackedLinear]] = {
    "bf16": lambda: PackedLinear.bf16(_dense()),
    "int8": _int8,
    "int4 128": lambda: _code4(128),
    "nf4 64": lambda: _code4(64),
}
