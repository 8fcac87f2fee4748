"""What this machine multiplies fast, found out by multiplying.

Flags do not tell: a CPU may list AVX512-FP16 while its matrix products in fp16 are an order of magnitude slower than in
bf16, because no fast kernel was built for them. So a few small products are timed, once per process.
"""

from __future__ import annotations

import time
from functools import cache

import torch
from torch.nn import functional as F

from serve.errors import UnsupportedHardware

__all__ = ["check_dtype", "fp16_slowdown"]

_ALLOWED_SLOWDOWN_RATIO = 1.2
_FEATURES = 1024
_TOKENS = (1, 64)
_REPEATS = 5


def check_dtype(dtype: torch.dtype, device: torch.device) -> None:
    """Raise `UnsupportedHardware` for fp16 on a CPU that multiplies it more than 1.2 times slower than bf16."""
    if dtype != torch.float16 or device.type != "cpu":
        return
    slowdown = fp16_slowdown()
    if slowdown > _ALLOWED_SLOWDOWN_RATIO:
        raise UnsupportedHardware(
            f"fp16: matrix products take {slowdown:.1f} times as long as in bf16 on this CPU; use bf16 instead"
        )


@cache
def fp16_slowdown() -> float:
    """The worst ratio of fp16 to bf16 time over a decoding and a prefill shape on this CPU."""
    return max(_fastest_s(torch.float16, tokens) / _fastest_s(torch.bfloat16, tokens) for tokens in _TOKENS)


def _fastest_s(dtype: torch.dtype, tokens: int) -> float:
    x = torch.ones(tokens, _FEATURES, dtype=dtype)
    weight = torch.ones(_FEATURES, _FEATURES, dtype=dtype)
    F.linear(x, weight)
    times = []
    for _ in range(_REPEATS):
        start = time.perf_counter()
        F.linear(x, weight)
        times.append(time.perf_counter() - start)
    return min(times)
