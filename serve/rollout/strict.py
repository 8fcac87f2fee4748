"""Reading mappings that people or other processes wrote: what is unknown, missing or no number fails by its path."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, fields
from typing import Any

from serve.errors import ConfigError

__all__ = ["check_keys", "number"]


def check_keys(path: str, mapping: object, cls: type[Any]) -> dict[str, Any]:
    """The mapping as keyword arguments of the dataclass `cls`, every key known and none missing."""
    if not isinstance(mapping, Mapping):
        raise ConfigError(path, f"must be a mapping, got {mapping!r}")
    allowed = {field.name: field for field in fields(cls) if field.init}
    for key in mapping:
        if key not in allowed:
            raise ConfigError(f"{path}.{key}", f"unknown key; allowed: {', '.join(allowed)}")
    for key, field in allowed.items():
        if key not in mapping and field.default is MISSING and field.default_factory is MISSING:
            raise ConfigError(f"{path}.{key}", "is missing")
    return dict(mapping)


def number(path: str, value: object, low: float, high: float) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise ConfigError(path, f"must be a number from {low:g} to {high:g}, got {value!r}")
    return float(value)
