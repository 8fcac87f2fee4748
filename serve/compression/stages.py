"""The steps that a recipe is made of, one frozen dataclass each.

A stage says *what* (a method and its options); `serve.compression.methods` knows *how*. This file knows no torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from decimal import Decimal
from math import inf
from typing import ClassVar, Literal

from serve.errors import RecipeError

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

Kind = Literal["dense", "structure", "prune", "quantize"]
_LARGEST_GROUP = 1 << 20  # wider than any layer
_NF4_BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)


@dataclass(frozen=True)
class Stage:
    """One step of a recipe. Subclasses are the plug-in keys: a method is looked up by the stage's class."""

    method: ClassVar[str]
    kind: ClassVar[Kind]

    @property
    def name(self) -> str:
        """The canonical spelling, which parses back to an equal stage."""
        return self.method

    @property
    def precision(self) -> str:
        """The short label for headers and metrics: the number format, without group sizes and the like."""
        return self.method

    @property
    def needs_calibration(self) -> bool:
        return False


@dataclass(frozen=True)
class Dense(Stage):
    """Ordinary floating point: every parameter in `dtype`."""

    method = "dense"
    kind = "dense"
    dtype: Literal["fp32", "bf16", "fp16"] = "bf16"

    @property
    def name(self) -> str:
        return self.dtype

    @property
    def precision(self) -> str:
        return self.dtype


@dataclass(frozen=True)
class Int8(Stage):
    """Weights in 8 bits per output channel, activations in 8 bits per token, measured on the fly."""

    method = "int8"
    kind = "quantize"


@dataclass(frozen=True)
class Int8Weight(Stage):
    """Weights in 8 bits per output channel; activations stay in floating point."""

    method = "int8-weight"
    kind = "quantize"


@dataclass(frozen=True)
class Int8Static(Stage):
    """Weights in 8 bits per channel, activations in 8 bits by a calibrated scale; `smooth` is SmoothQuant's alpha."""

    method = "int8-static"
    kind = "quantize"
    smooth: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.smooth <= 1:
            raise RecipeError(f"int8-static: smooth {self.smooth} is not between 0 (activations as they are) and 1")

    @property
    def name(self) -> str:
        return self.method + _unless_default("smooth", self.smooth, 0.5)

    @property
    def needs_calibration(self) -> bool:
        return True


@dataclass(frozen=True)
class LlmInt8(Stage):
    """LLM.int8(): outlier columns above `threshold` stay in 16 bits (bitsandbytes, CUDA)."""

    method = "llm-int8"
    kind = "quantize"
    threshold: float = 6.0

    def __post_init__(self) -> None:
        if not 0 <= self.threshold < inf:
            raise RecipeError(f"llm-int8: threshold {self.threshold} is not a finite number of 0 or more")

    @property
    def name(self) -> str:
        return self.method + _unless_default("t", self.threshold, 6.0)


@dataclass(frozen=True)
class Fp8(Stage):
    """Weights and activations in 8-bit floating point (e4m3), where the hardware multiplies it."""

    method = "fp8"
    kind = "quantize"


@dataclass(frozen=True)
class Nf4(Stage):
    """4-bit NormalFloat in blocks; `double_quantization` stores the blocks' scales in 8 bits too."""

    method = "nf4"
    kind = "quantize"
    block_size: int = 64
    double_quantization: bool = False

    def __post_init__(self) -> None:
        if self.block_size not in _NF4_BLOCKS:
            raise RecipeError(f"nf4: block size {self.block_size} is not one of {_listed(_NF4_BLOCKS)}")

    @property
    def name(self) -> str:
        return self.method + _unless_default("b", self.block_size, 64) + ("-dq" if self.double_quantization else "")


@dataclass(frozen=True)
class Grouped(Stage):
    """Integers with one scale (and, unless symmetric, one zero point) per `group_size` inputs; -1 is a whole row."""

    kind = "quantize"
    allowed_bits: ClassVar[tuple[int, ...]] = (2, 3, 4, 8)
    bits: int = 4
    group_size: int = 128
    symmetric: bool = True

    def __post_init__(self) -> None:
        if self.bits not in self.allowed_bits:
            raise RecipeError(f"{self.method}: {self.bits} bits is not one of {_listed(self.allowed_bits)}")
        if self.group_size != -1 and (not 8 <= self.group_size <= _LARGEST_GROUP or self.group_size % 8):
            raise RecipeError(
                f"{self.method}: group size {self.group_size} is not a multiple of 8 up to {_LARGEST_GROUP}, "
                "nor -1 (`row` in a name) for a whole row"
            )

    @property
    def precision(self) -> str:
        return f"{self.method}{self.bits}"

    @property
    def name(self) -> str:
        group = "-row" if self.group_size == -1 else _unless_default("g", self.group_size, 128)
        return self.precision + group + ("" if self.symmetric else "-asym")


@dataclass(frozen=True)
class RoundToNearest(Grouped):
    """Each weight to the nearest point of its group's grid: the baseline, without calibration."""

    method = "rtn"


@dataclass(frozen=True)
class Gptq(Grouped):
    """GPTQ: each column's rounding error is passed on to the columns not yet rounded."""

    method = "gptq"
    activation_order: bool = False
    damping: float = 0.05

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.damping < 1:
            raise RecipeError(f"gptq: damping {self.damping} is not between 0 and 1")

    @property
    def name(self) -> str:
        return super().name + ("-act" if self.activation_order else "") + _unless_default("damp", self.damping, 0.05)

    @property
    def needs_calibration(self) -> bool:
        return True


@dataclass(frozen=True)
class Awq(Grouped):
    """AWQ: input channels that carry much are scaled up before rounding, and their producer down."""

    method = "awq"
    allowed_bits = (3, 4, 8)
    symmetric: bool = True

    @property
    def needs_calibration(self) -> bool:
        return True


@dataclass(frozen=True)
class Mixed(Stage):
    """Each projection in its own precision, chosen by measured sensitivity; on average `budget_bits` per weight."""

    method = "mixed"
    kind = "quantize"
    budget_bits: float = 4.5

    def __post_init__(self) -> None:
        if not 2.5 <= self.budget_bits <= 32:
            raise RecipeError(f"mixed: a budget of {self.budget_bits:g} bits is not between 2.5 and 32")

    @property
    def name(self) -> str:
        return f"{self.method}{_plain(self.budget_bits)}"

    @property
    def precision(self) -> str:
        return self.name

    @property
    def needs_calibration(self) -> bool:
        return True


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


def _unless_default(prefix: str, value: float, default: float) -> str:
    return "" if value == default else f"-{prefix}{_plain(value)}"


def _plain(value: float) -> str:
    """Every digit, and no exponent, so that a name reads back as it was."""
    text = f"{Decimal(repr(value)):f}"
    return text.removesuffix(".0")


def _percent(share: float) -> int:
    return round(share * 100)


def _listed(values: tuple[object, ...]) -> str:
    return ", ".join(str(value) for value in values)
