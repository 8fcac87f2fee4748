"""`python -m serve.kernels`: compile the kernels now instead of at the first start, and say what there is.

With `--measure`, how fast they are here. With `--every-cpu` those of all CPUs are compiled, also where this one can run
none of them: an image is built on one machine and runs on others.
"""

from __future__ import annotations

import os
import sys

from serve.kernels import unavailable
from serve.kernels.build import BUILDS, compiled
from serve.kernels.measure import measure

if "--every-cpu" in sys.argv[1:]:
    for name, instructions in BUILDS.items():
        library = compiled(instructions)
        if isinstance(library, str):
            sys.exit(f"kernels for {name}: {library}")
        print(f"kernels for {name}: {library}")
    sys.exit()

reason = unavailable()
print("kernels: compiled for this CPU" if reason is None else f"kernels: none, the plain path runs: {reason}")
if reason is None and "--measure" in sys.argv[1:]:
    for line in measure(len(os.sched_getaffinity(0))):
        print(line, flush=True)
