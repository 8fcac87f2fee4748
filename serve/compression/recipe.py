"""What to do to a model's weights, as data: an ordered list of stages that parses, prints and round-trips.

A recipe is written as one string (`wanda50+gptq4-g64-asym`), as a list of stages, or as a mapping:

    recipe: {stages: [wanda-2:4, {method: gptq, bits: 4, group_size: 64}], lm_head: int8, skip: ["model.layers.0.*"]}

Stages run in the order given: at most one that removes structure, then pruning, then at most one quantizer, which
stores what is left. A 16- or 32-bit name among them sets the type that everything else is stored and computed in.
This file knows no torch: the configuration reads it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields
from itertools import pairwise
from typing import Any, Literal

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
    Kind,
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

__all__ = ["Recipe"]

LmHead = Literal["keep", "int8"]
_ORDER: dict[Kind, int] = {"structure": 0, "prune": 1, "quantize": 2}


@dataclass(frozen=True)
class Recipe:
    """Ordered stages, what happens to the head, and the layers left alone.

    `lm_head` "keep" leaves the output head in the recipe's floating type. `skip` holds shell patterns on module
    names (`model.layers.0.*`). Knows nothing about how any stage is carried out.
    """

    stages: tuple[Stage, ...] = (Dense(),)
    lm_head: LmHead = "keep"
    skip: tuple[str, ...] = ()
    overrides: tuple[tuple[str, str], ...] = field(default=())

    def __post_init__(self) -> None:
        _check_order(self.stages)
        if self.lm_head not in ("keep", "int8"):
            raise RecipeError(f"recipe: lm_head {self.lm_head!r} is not one of keep, int8")

    @classmethod
    def parse(cls, spec: str | Sequence[Any] | Mapping[str, Any]) -> Recipe:
        """Read a name, a list of stages or a mapping; raise `RecipeError`, naming what is known."""
        if isinstance(spec, str):
            return _parse_text(spec)
        if isinstance(spec, Mapping):
            return cls.from_dict(spec)
        if isinstance(spec, Sequence):
            return cls.from_dict({"stages": spec})
        raise RecipeError(f"recipe: expected a name, a list or a mapping, got {type(spec).__name__}")

    @property
    def dtype(self) -> str:
        """The floating type of everything that no stage stores otherwise, and of activations."""
        return next((s.dtype for s in self.stages if isinstance(s, Dense)), "bf16")

    @property
    def quantizer(self) -> Stage | None:
        return next((s for s in self.stages if s.kind == "quantize"), None)

    @property
    def structures(self) -> tuple[Structure, ...]:
        """The stages that cut the model smaller before all others, in order."""
        return tuple(s for s in self.stages if isinstance(s, Structure))

    @property
    def work(self) -> tuple[Stage, ...]:
        """The stages that change anything: all but the floating type."""
        return tuple(s for s in self.stages if s.kind != "dense")

    @property
    def needs_calibration(self) -> bool:
        """Whether any stage looks at text, those of overrides included."""
        return bool(self.structures) or self.calibrates_layers

    @property
    def calibrates_layers(self) -> bool:
        """Whether text is needed once the model has its size."""
        inner = [stage for _, target in self.overrides for stage in _parse_text(target).stages]
        return any(stage.needs_calibration for stage in (*self.stages, *inner) if not isinstance(stage, Structure))

    @property
    def precision(self) -> str:
        """The stored number format: `bf16`, `int8`, `nf4`, `gptq4`."""
        return self.quantizer.precision if self.quantizer else self.dtype

    @property
    def name(self) -> str:
        """One canonical string; parses back to an equal recipe unless `skip` or `overrides` are set."""
        dense = [Dense(self.dtype).name] if self.dtype != "bf16" or not self.work else []  # type: ignore[arg-type]
        head = ["head8"] if self.lm_head == "int8" else []
        return "+".join([*dense, *(stage.name for stage in self.work), *head])

    def to_dict(self) -> dict[str, Any]:
        return {
            "stages": [{"method": stage.method, **asdict(stage)} for stage in self.stages],
            "lm_head": self.lm_head,
            "skip": list(self.skip),
            "overrides": [list(pair) for pair in self.overrides],  # their order decides
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Recipe:
        if "method" in data:
            data = {"stages": [data]}
        _check_keys("recipe", data, ("stages", "mixed", "lm_head", "skip", "overrides"))
        entries = list(_sequence("stages", data.get("stages", ())))
        if "mixed" in data:
            entries.append({"method": Mixed.method, **_mapping("mixed", data["mixed"])})
        parsed = [
            _read_text(entry) if isinstance(entry, str) else ([_read_mapping(entry)], "keep") for entry in entries
        ]
        stages = [stage for part, _ in parsed for stage in part]
        head = "int8" if any(head == "int8" for _, head in parsed) else "keep"
        overrides = _overrides(data.get("overrides", {}))
        return cls(
            stages=_with_dtype(stages),
            lm_head=data.get("lm_head", head),
            skip=tuple(str(pattern) for pattern in _sequence("skip", data.get("skip", ()))),
            overrides=overrides,
        )


_Build = Callable[[re.Match[str], dict[str, Any]], Stage]


def _parse_text(text: str) -> Recipe:
    stages, head = _read_text(text)
    return Recipe(stages=_with_dtype(stages), lm_head=head)


def _read_text(text: str) -> tuple[list[Stage], LmHead]:
    """The stages that the text names, and no others."""
    parts = [part.strip() for part in text.strip().lower().split("+")]
    head: LmHead = "int8" if "head8" in parts else "keep"
    return [_parse_stage(part) for part in parts if part != "head8"], head


def _with_dtype(stages: Sequence[Stage]) -> tuple[Stage, ...]:
    """The floating type first, and always there."""
    dense = [stage for stage in stages if isinstance(stage, Dense)]
    if len(dense) > 1:
        raise RecipeError(f"recipe: two floating types, {dense[0].name} and {dense[1].name}; a model has one")
    return (*(dense or [Dense()]), *(stage for stage in stages if not isinstance(stage, Dense)))


def _read_mapping(entry: Any) -> Stage:
    if not isinstance(entry, Mapping):
        raise RecipeError(f"recipe: a stage is a name or a mapping, not {type(entry).__name__}")
    by_method = {cls.method: cls for cls in _STAGES}
    method = entry.get("method")
    if method not in by_method:
        raise RecipeError(f"recipe: unknown method {method!r}; known: {_listed(sorted(by_method))}")
    cls = by_method[method]
    options = {key: value for key, value in entry.items() if key != "method"}
    allowed = {f.name: f for f in fields(cls)}
    _check_keys(f"recipe: {method}", options, tuple(allowed))
    for key, value in options.items():
        default = allowed[key].default
        assert default is not MISSING
        if not _same_type(value, default):
            raise RecipeError(f"recipe: {method}.{key}: expected {type(default).__name__}, got {value!r}")
    if cls is Dense and options.get("dtype", "bf16") not in ("fp32", "bf16", "fp16"):
        raise RecipeError(f"recipe: dense.dtype: {options['dtype']!r} is not one of fp32, bf16, fp16")
    return _build(cls, options)


def _same_type(value: Any, default: Any) -> bool:
    if isinstance(default, bool) or isinstance(value, bool):
        return isinstance(value, bool) and isinstance(default, bool)
    if isinstance(default, float):
        return isinstance(value, (int, float))
    return isinstance(value, type(default))


def _parse_stage(text: str) -> Stage:
    name, *options = text.split("-")
    for prefix in ("int8-weight", "int8-static", "llm-int8"):
        if text == prefix or text.startswith(prefix + "-"):
            name, options = prefix, [o for o in text[len(prefix) :].split("-") if o]
    if name in ("fp32", "bf16", "fp16"):
        _no_options(name, options)
        return Dense(name)  # type: ignore[arg-type]
    if name in _PLAIN:
        return _build(_PLAIN[name], _options(text, options, _OPTIONS.get(_PLAIN[name], {})))
    if match := re.fullmatch(r"mixed(\d+(?:\.\d+)?)?", text):
        return _build(Mixed, {"budget_bits": float(match[1])} if match[1] else {})
    match = re.fullmatch(r"([a-z]+)(\d*)", name)
    cls = _NUMBERED.get(match[1]) if match else None
    if cls is None or match is None:
        raise RecipeError(f"recipe: unknown name {text!r}; known: {_KNOWN}")
    number = match[2]
    if issubclass(cls, Grouped):
        bits = {"bits": int(number)} if number else {}
        return _build(cls, bits | _options(text, options, _OPTIONS[cls]))
    if issubclass(cls, Sparse) and options == ["2:4"] and not number:
        return _build(cls, {"pattern": "2:4"})
    _no_options(text, options)
    if not number:
        raise RecipeError(f"recipe: {text!r} lacks the percentage to remove, as in {cls.method}50")
    return _build(cls, {"share" if issubclass(cls, Structure) else "sparsity": int(number) / 100})


def _build(cls: type[Any], options: Mapping[str, Any]) -> Stage:
    stage: Stage = cls(**options)
    return stage


_OptionTable = dict[str, tuple[str, Callable[[str], Any]]]


def _options(text: str, options: Sequence[str], table: _OptionTable) -> dict[str, Any]:
    """Each dash option by its pattern; an option that nobody knows, or one given twice, is an error."""
    found: dict[str, Any] = {}
    for option in options:
        match = next((m for pattern in table if (m := re.fullmatch(pattern, option))), None)
        if match is None:
            known = ", ".join(_SPELLING[p] for p in table) or "none"
            raise RecipeError(f"recipe: {text!r}: unknown option {option!r}; known: {known}")
        key, read = table[match.re.pattern]
        if key in found:
            raise RecipeError(f"recipe: {text!r}: {key} is given twice")
        found[key] = read(match[match.lastindex or 0])
    return found


def _no_options(text: str, options: Sequence[str]) -> None:
    if options:
        raise RecipeError(f"recipe: {text!r}: unknown option {options[0]!r}; known: none")


def _check_order(stages: Sequence[Stage]) -> None:
    work = [stage for stage in stages if stage.kind != "dense"]
    for first, second in pairwise(work):
        if first.kind == second.kind == "quantize":
            raise RecipeError(
                f"recipe: {first.name}+{second.name}: two quantizers exclude each other, "
                "for the second would round what the first has already rounded; keep one"
            )
        if type(first) is type(second):
            raise RecipeError(f"recipe: {first.name}+{second.name}: the same method twice; keep one")
        if _ORDER[first.kind] > _ORDER[second.kind]:
            raise RecipeError(
                f"recipe: {first.name}+{second.name}: the order is structure, then pruning, then a quantizer; "
                f"write {second.name}+{first.name}"
            )
        if first.kind == second.kind == "prune":
            raise RecipeError(f"recipe: {first.name}+{second.name}: two ways to choose the zeros; keep one")


def _check_keys(where: str, data: Mapping[str, Any], allowed: Sequence[str]) -> None:
    for key in data:
        if key not in allowed:
            raise RecipeError(f"{where}: unknown key {key!r}; known: {_listed(allowed)}")


def _overrides(value: Any) -> tuple[tuple[str, str], ...]:
    """Name patterns and recipes, as a mapping or (in manifests, which sort their keys) as pairs."""
    pairs = list(value.items()) if isinstance(value, Mapping) else _sequence("overrides", value)
    found = []
    for pair in pairs:
        if not isinstance(pair, (list, tuple)) or len(pair) != 2 or not all(isinstance(part, str) for part in pair):
            raise RecipeError(f"recipe: overrides: {pair!r} is not a name pattern and a recipe")
        _parse_text(pair[1])
        found.append((pair[0], pair[1]))
    return tuple(found)


def _mapping(key: str, value: Any) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise RecipeError(f"recipe: {key} is not a mapping")
    return value


def _sequence(key: str, value: Any) -> Sequence[Any]:
    if isinstance(value, (str, Mapping)) or not isinstance(value, Sequence):
        raise RecipeError(f"recipe: {key} is not a list")
    return value


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
