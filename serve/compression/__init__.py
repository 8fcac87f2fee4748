"""How a model gets smaller. Knows torch; knows no server.

`Recipe` says what to do and needs nothing heavy; everything else is imported when it is first asked for.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from serve.compression.calibration import Calibration
    from serve.compression.compress import Progress
    from serve.compression.recipe import Recipe
    from serve.compression.report import LoadReport

__all__ = ["Calibration", "LoadReport", "Progress", "Recipe"]

_WHERE = {"Calibration": "calibration", "LoadReport": "report", "Progress": "compress", "Recipe": "recipe"}


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_WHERE[name]}"), name)
