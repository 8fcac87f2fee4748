"""What every step of a recipe is, the floating type that every recipe has, and how numbers are spelled in a name."""

from __future__ import annotations

from dataclasses import dataclass
from decimal import Decimal
from typing import ClassVar, Literal

__all__ = ["Dense", "Kind", "Stage", "listed", "option", "plain_number"]

Kind = Literal["dense", "structure", "prune", "quantize"]


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


def option(prefix: str, value: float, default: float) -> str:
    """A number as an option of a name, left out where it is the default."""
    return "" if value == default else f"-{prefix}{plain_number(value)}"


def plain_number(value: float) -> str:
    """Every digit, and no exponent, so that a name reads back as it was."""
    text = f"{Decimal(repr(value)):f}"
    return text.removesuffix(".0")


def listed(values: tuple[object, ...]) -> str:
    """As an error names them."""
    return ", ".join(str(value) for value in values)
