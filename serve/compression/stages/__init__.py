"""The steps that a recipe is made of, one frozen dataclass each.

A stage says *what* (a method and its options); `serve.compression.methods` knows *how*. This package knows no torch.
"""

from __future__ import annotations

from serve.compression.stages.quantizing import (
    Awq,
    Fp8,
    Gptq,
    Grouped,
    Int8,
    Int8Static,
    Int8Weight,
    LlmInt8,
    Mixed,
    Nf4,
    RoundToNearest,
)
from serve.compression.stages.removing import Depth, Magnitude, Sparse, SparseGpt, Structure, Structured, Wanda
from serve.compression.stages.stage import Dense, Kind, Stage

__all__ = [
    "Awq",
    "Dense",
    "Depth",
    "Fp8",
    "Gptq",
    "Grouped",
    "Int8",
    "Int8Static",
    "Int8Weight",
    "Kind",
    "LlmInt8",
    "Magnitude",
    "Mixed",
    "Nf4",
    "RoundToNearest",
    "Sparse",
    "SparseGpt",
    "Stage",
    "Structure",
    "Structured",
    "Wanda",
]
