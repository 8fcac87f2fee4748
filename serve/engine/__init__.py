"""How tokens are made: continuous batching over transformers' models, in one thread, without knowing who asks.

Names load on first use, so that a configuration can be read (`EngineSettings`) without torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from serve.engine.settings import EngineSettings

if TYPE_CHECKING:
    from serve.engine.engine import Engine, EngineStats

__all__ = ["Engine", "EngineSettings", "EngineStats"]

_MODULES = {"Engine": "engine", "EngineStats": "engine"}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
