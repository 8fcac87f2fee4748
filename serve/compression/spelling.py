"""How one stage is written, as a name with options after dashes or as a mapping, and what is wrong where it isn't one.

    gptq4-g64-asym-act      {method: gptq, bits: 4, group_size: 64, symmetric: false, activation_order: true}

Which stages may follow one another is `serve.compression.recipe`'s. This file knows no torch.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, fields
from typing import Any

from serve.compression.stages import (
    Awq,
    Dense,
    Depth,
    Fp8,
    Gptq,
    Grouped,
    Int8,
    Int8Static,
    Int8Weight,
    LlmInt8,
    Magnitude,
    Mixed,
    Nf4,
    RoundToNearest,
    Sparse,
    SparseGpt,
    Stage,
    Structure,
    Structured,
    Wanda,
)
from serve.errors import RecipeError

__all__ = ["check_keys", "parse_stage", "read_mapping", "shown"]

_LONGEST_SHOWN = 60


def parse_stage(text: str) -> Stage:
    """One name with its options; raise `RecipeError`, naming what is known."""
    name, *options = text.split("-")
    for prefix in ("int8-weight", "int8-static", "llm-int8"):
        if text == prefix or text.startswith(prefix + "-"):
            name, options = prefix, [o for o in text[len(prefix) :].split("-") if o]
    if name in ("fp32", "bf16", "fp16"):
        _no_options(text, options)
        return Dense(name)  # type: ignore[arg-type]
    if name in _PLAIN:
        return _build(_PLAIN[name], _options(text, options, _OPTIONS.get(_PLAIN[name], {})))
    if match := re.fullmatch(rf"mixed{_FLOAT}?", text, re.ASCII):
        return _build(Mixed, {"budget_bits": float(match[1])} if match[1] else {})
    match = re.fullmatch(rf"([a-z]+){_FLOAT}?", name, re.ASCII)
    cls = _NUMBERED.get(match[1]) if match else None
    if cls is None or match is None or (issubclass(cls, Grouped) and "." in name):
        raise RecipeError(f"recipe: unknown name {shown(text)}; known: {_KNOWN}")
    number = match[2]
    if issubclass(cls, Grouped):
        bits = {"bits": int(number)} if number else {}
        return _build(cls, bits | _options(text, options, _OPTIONS[cls]))
    if issubclass(cls, Sparse) and options:
        return _build(cls, _pattern(text, cls, number, options))
    _no_options(text, options)
    if not number:
        raise RecipeError(f"recipe: {shown(text)} lacks the percentage to remove, as in {cls.method}50")
    return _build(cls, {"share" if issubclass(cls, Structure) else "sparsity": float(number) / 100})


def read_mapping(entry: Any) -> Stage:
    """A stage by its method and options; raise `RecipeError` naming the key that is wrong."""
    if not isinstance(entry, Mapping):
        raise RecipeError(f"recipe: a stage is a name or a mapping, not {type(entry).__name__}")
    by_method = {cls.method: cls for cls in _STAGES}
    method = entry.get("method")
    if not isinstance(method, str) or method not in by_method:
        raise RecipeError(f"recipe: unknown method {method!r}; known: {_listed(sorted(by_method))}")
    cls = by_method[method]
    options = {key: value for key, value in entry.items() if key != "method"}
    allowed = {f.name: f for f in fields(cls)}
    check_keys(f"recipe: {method}", options, tuple(allowed))
    for key, value in options.items():
        default = allowed[key].default
        assert default is not MISSING
        if not _same_type(value, default):
            raise RecipeError(f"recipe: {method}.{key}: expected {type(default).__name__}, got {value!r}")
    if cls is Dense and options.get("dtype", "bf16") not in ("fp32", "bf16", "fp16"):
        raise RecipeError(f"recipe: dense.dtype: {options['dtype']!r} is not one of fp32, bf16, fp16")
    return _build(cls, options)


def check_keys(where: str, data: Mapping[str, Any], allowed: Sequence[str]) -> None:
    """Raise `RecipeError` naming the first key of `data` that is not allowed."""
    for key in data:
        if key not in allowed:
            raise RecipeError(f"{where}: unknown key {key!r}; known: {_listed(allowed)}")


def shown(text: str) -> str:
    """As an error quotes it: never pages of it."""
    return repr(text if len(text) <= _LONGEST_SHOWN else text[:_LONGEST_SHOWN] + "...")


def _same_type(value: Any, default: Any) -> bool:
    if isinstance(default, bool) or isinstance(value, bool):
        return isinstance(value, bool) and isinstance(default, bool)
    if isinstance(default, float):
        return isinstance(value, (int, float))
    return isinstance(value, type(default))


def _pattern(text: str, cls: type[Sparse], number: str | None, options: Sequence[str]) -> dict[str, Any]:
    """A pattern says how much goes, so a percentage beside it is one too many."""
    if options == ["2:4"] and not number:
        return {"pattern": "2:4"}
    if options == ["2:4"]:
        raise RecipeError(f"recipe: {shown(text)}: the pattern 2:4 removes exactly half; write {cls.method}-2:4")
    raise RecipeError(
        f"recipe: {shown(text)}: unknown option {shown(options[0])}; known: 2:4, without a percentage, as in "
        f"{cls.method}-2:4"
    )


def _build(cls: type[Any], options: Mapping[str, Any]) -> Stage:
    stage: Stage = cls(**options)
    return stage


_OptionTable = dict[str, tuple[str, Callable[[str], Any]]]


def _options(text: str, options: Sequence[str], table: _OptionTable) -> dict[str, Any]:
    """Each dash option by its pattern; an option that nobody knows, or one given twice, is an error."""
    found: dict[str, Any] = {}
    for option in options:
        match = next((m for pattern in table if (m := re.fullmatch(pattern, option, re.ASCII))), None)
        if match is None:
            known = ", ".join(_SPELLING[p] for p in table) or "none"
            raise RecipeError(f"recipe: {shown(text)}: unknown option {shown(option)}; known: {known}")
        key, read = table[match.re.pattern]
        if key in found:
            raise RecipeError(f"recipe: {shown(text)}: {key} is given twice")
        found[key] = read(match[match.lastindex or 0])
    return found


def _no_options(text: str, options: Sequence[str]) -> None:
    if options:
        raise RecipeError(f"recipe: {shown(text)}: unknown option {shown(options[0])}; known: none")


def _listed(values: Sequence[Any]) -> str:
    return ", ".join(str(value) for value in values)


_GROUP_OPTIONS: _OptionTable = {
    r"g(\d+)": ("group_size", int),
    r"row": ("group_size", lambda _: -1),
    r"(a?sym)": ("symmetric", lambda text: text == "sym"),
}
_FLOAT = r"(\d+(?:\.\d+)?)"
_OPTIONS: dict[type[Stage], _OptionTable] = {
    Nf4: {r"b(\d+)": ("block_size", int), r"dq": ("double_quantization", lambda _: True)},
    LlmInt8: {rf"t{_FLOAT}": ("threshold", float)},
    Int8Static: {rf"smooth{_FLOAT}": ("smooth", float)},
    RoundToNearest: _GROUP_OPTIONS,
    Awq: _GROUP_OPTIONS,
    Gptq: {**_GROUP_OPTIONS, r"act": ("activation_order", lambda _: True), rf"damp{_FLOAT}": ("damping", float)},
}
_SPELLING = {
    r"g(\d+)": "gN (group size)", r"row": "row (one group per row)", r"(a?sym)": "sym | asym", r"b(\d+)": "bN (block)",
    r"dq": "dq (double quantization)", rf"t{_FLOAT}": "tX (threshold)", rf"smooth{_FLOAT}": "smoothX",
    r"act": "act (activation order)", rf"damp{_FLOAT}": "dampX",
}  # fmt: skip
_STAGES: tuple[type[Any], ...] = (
    Dense, Int8, Int8Weight, Int8Static, LlmInt8, Fp8, Nf4, RoundToNearest, Gptq, Awq, Mixed,
    Magnitude, Wanda, SparseGpt, Structured, Depth,
)  # fmt: skip
_PLAIN: dict[str, type[Any]] = {cls.method: cls for cls in (Int8, Int8Weight, Int8Static, LlmInt8, Fp8, Nf4)}
_NUMBERED: dict[str, type[Any]] = {
    cls.method: cls for cls in (RoundToNearest, Gptq, Awq, Magnitude, Wanda, SparseGpt, Structured, Depth)
}
_KNOWN = (
    "fp32, bf16, fp16, int8, int8-weight, int8-static, llm-int8, fp8, nf4, rtn4, gptq4, awq4, mixed4.5, "
    "magnitude50, wanda50, wanda-2:4, sparsegpt50, structured25, depth25 (joined by +, e.g. wanda50+gptq4-g64-asym)"
)
