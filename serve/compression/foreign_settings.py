"""What config.json says of how another program compressed a checkpoint, read strictly: guesses would serve nonsense.

Every refusal names the field of `quantization_config` and what can be done instead. Knows nothing about tensors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from serve.errors import CheckpointError

__all__ = ["ForeignSettings", "read_settings"]

_REMEDY = "start from the uncompressed model, which any recipe here compresses"
_KINDS = f"gptq, awq (gemm) and bitsandbytes (NF4, 8-bit) can; {_REMEDY}"


@dataclass(frozen=True)
class ForeignSettings:
    """How it was written. `bits` and `group_size` are of GPTQ and AWQ; `zeros_less_one` is GPTQ's older format;
    `asymmetric` says whether AWQ stores zero points, `double_quantization` whether NF4's scales are in 8 bits.
    """

    method: Literal["gptq", "awq", "nf4", "int8"]
    bits: int = 4
    group_size: int = -1
    zeros_less_one: bool = False
    asymmetric: bool = False
    double_quantization: bool = False


def read_settings(settings: Mapping[str, Any], folder: Path) -> ForeignSettings:
    """Raise `CheckpointError` where they describe what cannot be read here."""
    fields = _Fields(settings, folder)
    by_bits = settings.get("load_in_4bit") or settings.get("load_in_8bit")  # older bitsandbytes left the method out
    method = settings.get("quant_method") or ("bitsandbytes" if by_bits else None)
    if method == "gptq":
        return _gptq(fields)
    if method == "awq":
        return _awq(fields)
    if method == "bitsandbytes":
        return _bitsandbytes(fields)
    raise fields.refusal("quant_method", _KINDS)


def _gptq(fields: _Fields) -> ForeignSettings:
    name = "checkpoint_format" if "checkpoint_format" in fields.settings else "format"
    form = fields.one_of(name, (None, "gptq", "gptq_v2"), "repack it as gptq, or " + _REMEDY)
    fields.one_of("is_marlin_format", (None, False), "repack it as gptq, or " + _REMEDY)
    fields.one_of("pack_dtype", (None, "int32"), _REMEDY)
    fields.one_of("lm_head", (None, False), "heads that were left alone can; " + _REMEDY)
    # Rules that begin with "-:" leave layers alone, which the file shows anyway.
    if any(not str(rule).startswith("-:") for rule in fields.settings.get("dynamic") or {}):
        raise fields.refusal(
            "dynamic", "one setting for all layers can, and rules that leave some alone (-:); " + _REMEDY
        )
    bits, group_size = fields.whole("bits", (2, 3, 4, 8)), fields.group_size()
    return ForeignSettings("gptq", bits, group_size, zeros_less_one=form != "gptq_v2")


def _awq(fields: _Fields) -> ForeignSettings:
    version = fields.settings.get("version", "gemm")
    if str(version).lower() != "gemm":
        raise fields.refusal("version", "gemm can, whose words lie in another order; " + _REMEDY)
    if fields.settings.get("backend") == "llm-awq":
        raise fields.refusal("backend", "files of AutoAWQ and GPTQModel can; " + _REMEDY)
    asymmetric = fields.one_of("zero_point", (None, True, False), _REMEDY) is not False
    return ForeignSettings("awq", fields.whole("bits", (4,)), fields.group_size(128), asymmetric=asymmetric)


def _bitsandbytes(fields: _Fields) -> ForeignSettings:
    if fields.settings.get("load_in_8bit"):
        return ForeignSettings("int8", 8)
    if not fields.settings.get("load_in_4bit"):
        raise fields.refusal("load_in_4bit", "neither it nor load_in_8bit is true; " + _REMEDY)
    fields.one_of("bnb_4bit_quant_type", ("nf4",), "nf4 can; " + _REMEDY)
    double = fields.one_of("bnb_4bit_use_double_quant", (None, True, False), _REMEDY)
    return ForeignSettings("nf4", double_quantization=bool(double))


@dataclass(frozen=True)
class _Fields:
    """The settings, and how to complain of one."""

    settings: Mapping[str, Any]
    folder: Path

    def refusal(self, field: str, remedy: str) -> CheckpointError:
        said = f"is {self.settings[field]!r}" if field in self.settings else "is missing"
        return CheckpointError(
            f"{self.folder}: config.json: quantization_config.{field} {said}, which cannot be read: {remedy}"
        )

    def one_of(self, field: str, allowed: Sequence[object], remedy: str) -> object:
        value = self.settings.get(field)
        if not any(value is known or (isinstance(value, str) and value == known) for known in allowed):
            raise self.refusal(field, remedy)
        return value

    def whole(self, field: str, allowed: Sequence[int]) -> int:
        value = self._int(field)
        if value is None or value not in allowed:
            raise self.refusal(field, f"{', '.join(map(str, allowed))} can; {_REMEDY}")
        return value

    def group_size(self, default: int | None = None) -> int:
        value = default if default is not None and "group_size" not in self.settings else self._int("group_size")
        if value is None or (value != -1 and (value < 8 or value % 8)):
            raise self.refusal("group_size", f"multiples of 8, and -1 for whole rows, can; {_REMEDY}")
        return value

    def _int(self, field: str) -> int | None:
        """Some writers put numbers into quotes."""
        value = self.settings.get(field)
        if isinstance(value, str) and value.removeprefix("-").isdecimal():
            return int(value)
        return value if isinstance(value, int) and not isinstance(value, bool) else None
