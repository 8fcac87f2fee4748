"""`python -m serve.kernels`: compile the kernels now instead of at the first start, and say what there is.

With `--measure`, how fast they are here.
"""

from __future__ import annotations

import os
import sys

from serve.kernels import unavailable
from serve.kernels.measure import measure

reason = unavailable()
print("kernels: compiled for this CPU" if reason is None else f"kernels: none, the plain path runs: {reason}")
if reason is None and "--measure" in sys.argv[1:]:
    for line in measure(len(os.sched_getaffinity(0))):
        print(line, flush=True)
