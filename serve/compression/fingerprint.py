"""What decides a compressed model's weights, to the last bit, and the short name that follows from it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from serve.compression import digests
from serve.compression.calibration import Calibration
from serve.compression.recipe import Recipe
from serve.compression.source import Source

__all__ = ["facts_of", "fingerprint_of"]

CODE_VERSION = 4
"""Part of every fingerprint: raised when the same recipe would give other numbers than before."""


def facts_of(source: Source, recipe: Recipe, calibration: Calibration | None) -> dict[str, Any]:
    """Everything that decides the weights."""
    return {
        "code_version": CODE_VERSION,
        "source": digests.of_folder(source.folder, source.weight_files),
        "recipe": recipe.to_dict(),
        "calibration": calibration.to_dict() if calibration is not None else None,
    }


def fingerprint_of(facts: Mapping[str, Any]) -> str:
    """Another name for any other facts."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]
