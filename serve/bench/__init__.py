"""How fast the engine is in process: prefill and decode by batch size, memory, and time to load.

`Bench` and its settings need no torch; `measure`, which does the work, runs in a process of its own (`run_bench`).
"""

from serve.bench.result import Bench, BenchSettings, Speed
from serve.bench.run import run_bench

__all__ = ["Bench", "BenchSettings", "Speed", "run_bench"]
