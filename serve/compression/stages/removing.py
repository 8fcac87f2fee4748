"""The stages that take something away: single weights, which become zero, or whole parts, leaving a smaller model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from serve.compression.stages.stage import Stage
from serve.errors import RecipeError

__all__ = ["Depth", "Magnitude", "Sparse", "SparseGpt", "Structure", "Structured", "Wanda"]


@dataclass(frozen=True)
class Sparse(Stage):
    """A share of the weights becomes zero; with `pattern` 2:4, two in every four neighbours."""

    kind = "prune"
    sparsity: float = 0.5
    pattern: Literal["", "2:4"] = ""

    def __post_init__(self) -> None:
        _check_share(self.method, self.sparsity)
        if self.pattern not in ("", "2:4"):
            raise RecipeError(f"{self.method}: pattern {self.pattern!r} is not '2:4' (or empty: unstructured)")
        if self.pattern and self.sparsity != 0.5:
            raise RecipeError(f"{self.method}: the pattern 2:4 removes exactly half, not {self.sparsity:.0%}")

    @property
    def name(self) -> str:
        return f"{self.method}-{self.pattern}" if self.pattern else f"{self.method}{_percent(self.sparsity)}"

    precision = name

    @property
    def needs_calibration(self) -> bool:
        return True


@dataclass(frozen=True)
class Magnitude(Sparse):
    """The smallest weights go."""

    method = "magnitude"

    @property
    def needs_calibration(self) -> bool:
        return False


@dataclass(frozen=True)
class Wanda(Sparse):
    """The weights with the smallest |weight| x input norm go, row by row."""

    method = "wanda"


@dataclass(frozen=True)
class SparseGpt(Sparse):
    """As GPTQ, with zero as the only grid point: what stays makes up for what goes."""

    method = "sparsegpt"


@dataclass(frozen=True)
class Structure(Stage):
    """A share of whole parts goes, leaving a smaller dense model."""

    kind = "structure"
    share: float = 0.25

    def __post_init__(self) -> None:
        _check_share(self.method, self.share)

    @property
    def name(self) -> str:
        return f"{self.method}{_percent(self.share)}"

    precision = name

    @property
    def needs_calibration(self) -> bool:
        return True


@dataclass(frozen=True)
class Structured(Structure):
    """Whole attention heads and MLP channels go."""

    method = "structured"


@dataclass(frozen=True)
class Depth(Structure):
    """Whole layers go, the least important first."""

    method = "depth"


def _check_share(method: str, share: float) -> None:
    if not 0 < share < 1 or abs(share * 100 - round(share * 100)) > 1e-9:
        raise RecipeError(f"{method}: {share * 100:g} % is not a whole percentage between 1 and 99")


def _percent(share: float) -> int:
    return round(share * 100)
