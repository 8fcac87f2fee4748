"""What this machine can do at most: bytes read from memory, and products in bf16 and int8, per second.

`python -m loadtest.engine.limits THREADS` prints them as JSON. Each is the best median over several ways of asking, so
that a slow way is not taken for a slow machine; an engine that finds a faster one gets a ratio above 1.
"""

import json
import statistics
import sys
import time
from collections.abc import Callable, Iterable

import numpy as np
import torch

_READ_BYTES = 512 << 20  # far beyond any cache
_SIZE = 2048
_REPEATS = 7


def measure(threads: int) -> dict[str, float]:
    """`{"bandwidth_bytes_per_s", "bf16_ops_per_s", "int8_ops_per_s"}`; a product and its sum are two operations."""
    torch.set_num_threads(threads)
    ops = 2 * _SIZE**3
    return {
        "bandwidth_bytes_per_s": _READ_BYTES / min(map(_seconds, _reads())),
        "bf16_ops_per_s": ops / min(map(_seconds, _bf16_products())),
        "int8_ops_per_s": ops / min(map(_seconds, _int8_products())),
    }


def _seconds(work: Callable[[], object]) -> float:
    taken = []
    for _ in range(1 + _REPEATS):
        start_s = time.perf_counter()
        work()
        taken.append(time.perf_counter() - start_s)
    return statistics.median(taken[1:])


def _reads() -> Iterable[Callable[[], object]]:
    values = torch.from_numpy(np.ones(_READ_BYTES // 4, dtype=np.float32))  # numpy asks for huge pages
    rows = values.view(-1, 4096)
    return (values.sum, values.max, lambda: torch.dot(values, values), lambda: rows.amax(1))


def _bf16_products() -> Iterable[Callable[[], object]]:
    a, b = (torch.randn(_SIZE, _SIZE).to(torch.bfloat16) for _ in range(2))
    return (lambda: a @ b, lambda: torch.nn.functional.linear(a, b))


def _int8_products() -> Iterable[Callable[[], object]]:
    a = torch.randint(-127, 127, (_SIZE, _SIZE), dtype=torch.int8)
    return (lambda: torch._int_mm(a, a), lambda: torch._int_mm(a, a.t()))


if __name__ == "__main__":
    with torch.inference_mode():
        print(json.dumps(measure(int(sys.argv[1]))))
