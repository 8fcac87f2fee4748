"""A bench in a fresh process."""

from __future__ import annotations

import os

from serve.bench.result import Bench, BenchSettings
from serve.compression.calibration import Calibration
from serve.compression.recipe import Recipe
from serve.fresh_process import Progress, run

__all__ = ["run_bench"]


def run_bench(
    source: str,
    recipe: Recipe,
    settings: BenchSettings,
    progress: Progress,
    *,
    device: str = "auto",
    calibration: Calibration | None = None,
    fresh: bool = False,
) -> Bench:
    """Load `source` as `recipe` says and time the engine; `fresh` leaves the artifact store alone.

    Raises a `SetupError` of one line where that cannot be.
    """
    return run(progress, _measure, source, recipe, settings, device, calibration, fresh)


def _measure(
    progress: Progress,
    source: str,
    recipe: Recipe,
    settings: BenchSettings,
    device: str,
    calibration: Calibration | None,
    fresh: bool,
) -> Bench:
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # as a replica has it, before torch comes
    from serve.bench.measure import measure  # torch, in the child only
    from serve.compression.artifact import default_root

    artifacts = None if fresh else default_root()
    return measure(source, recipe, settings, progress, device=device, calibration=calibration, artifacts=artifacts)
