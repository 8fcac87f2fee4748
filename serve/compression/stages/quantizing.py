"""The stages that store what is left: in fewer bits, each in its own way. At most one of them, and the last."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf
from typing import ClassVar

from serve.compression.stages.stage import Stage, listed, option, plain_number
from serve.errors import RecipeError

__all__ = [
    "Awq", "Fp8", "Gptq", "Grouped", "Int8", "Int8Static", "Int8Weight", "LlmInt8", "Mixed", "Nf4", "RoundToNearest",
]  # fmt: skip

_LARGEST_GROUP = 1 << 20  # wider than any layer
_NF4_BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)


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
        return self.method + option("smooth", self.smooth, 0.5)

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
        return self.method + option("t", self.threshold, 6.0)


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
            raise RecipeError(f"nf4: block size {self.block_size} is not one of {listed(_NF4_BLOCKS)}")

    @property
    def name(self) -> str:
        return self.method + option("b", self.block_size, 64) + ("-dq" if self.double_quantization else "")


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
            raise RecipeError(f"{self.method}: {self.bits} bits is not one of {listed(self.allowed_bits)}")
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
        group = "-row" if self.group_size == -1 else option("g", self.group_size, 128)
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
        return super().name + ("-act" if self.activation_order else "") + option("damp", self.damping, 0.05)

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
        return f"{self.method}{plain_number(self.budget_bits)}"

    @property
    def precision(self) -> str:
        return self.name

    @property
    def needs_calibration(self) -> bool:
        return True
