"""`python -m serve.kernels`: compile the kernels now instead of at the first start, and say what there is."""

from __future__ import annotations

from serve.kernels import unavailable

reason = unavailable()
print("kernels: compiled for this CPU" if reason is None else f"kernels: none, the plain path runs: {reason}")
