"""What to do to a model's weights, as data: an ordered list of stages that parses, prints and round-trips.

A recipe is written as one string (`wanda50+gptq4-g64-asym`), as a list of stages, or as a mapping:

    recipe: {stages: [wanda-2:4, {method: gptq, bits: 4, group_size: 64}], lm_head: int8, skip: ["model.layers.0.*"]}

Stages run in the order given: at most one that removes structure, then pruning, then at most one quantizer, which
stores what is left. A 16- or 32-bit name among them sets the type that everything else is stored and computed in.
`serve.compression.spelling` reads and explains the single stage. This file knows no torch: the configuration reads it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import combinations, pairwise
from typing import Any, Literal

from serve.compression.spelling import check_keys, parse_stage, read_mapping, shown
from serve.compression.stages import Dense, Kind, Mixed, Stage, Structure
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
        for pattern, target in self.overrides:
            _check_override(pattern, target)

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
        check_keys("recipe", data, ("stages", "mixed", "lm_head", "skip", "overrides"))
        entries = list(_sequence("stages", data.get("stages", ())))
        if "mixed" in data:
            options = _mapping("mixed", data["mixed"])
            check_keys("recipe: mixed", options, ("budget_bits",))
            entries.append({"method": Mixed.method, **options})
        parsed = [_read_text(entry) if isinstance(entry, str) else ([read_mapping(entry)], "keep") for entry in entries]
        stages = [stage for part, _ in parsed for stage in part]
        head = "int8" if any(head == "int8" for _, head in parsed) else "keep"
        if head == "int8" and data.get("lm_head", head) == "keep":
            raise RecipeError("recipe: lm_head: keep contradicts the stage head8; leave one of them out")
        return cls(
            stages=_with_dtype(stages),
            lm_head=data.get("lm_head", head),
            skip=tuple(_name_pattern("skip", pattern) for pattern in _sequence("skip", data.get("skip", ()))),
            overrides=_overrides(data.get("overrides", {})),
        )


def _parse_text(text: str) -> Recipe:
    stages, head = _read_text(text)
    return Recipe(stages=_with_dtype(stages), lm_head=head)


def _read_text(text: str) -> tuple[list[Stage], LmHead]:
    """The stages that the text names, and no others."""
    parts = [part.strip() for part in text.strip().lower().split("+")]
    if len(parts) > 1 and "" in parts:
        raise RecipeError(f"recipe: {shown(text)}: nothing stands beside one of its +")
    head: LmHead = "int8" if "head8" in parts else "keep"
    return [parse_stage(part) for part in parts if part != "head8"], head


def _with_dtype(stages: Sequence[Stage]) -> tuple[Stage, ...]:
    """The floating type first, and always there."""
    dense = [stage for stage in stages if isinstance(stage, Dense)]
    if len(dense) > 1:
        raise RecipeError(f"recipe: two floating types, {dense[0].name} and {dense[1].name}; a model has one")
    return (*(dense or [Dense()]), *(stage for stage in stages if not isinstance(stage, Dense)))


def _check_order(stages: Sequence[Stage]) -> None:
    work = [stage for stage in stages if stage.kind != "dense"]
    for first, second in pairwise(work):
        if first.kind == second.kind == "quantize":
            raise RecipeError(
                f"recipe: {first.name}+{second.name}: two quantizers exclude each other, "
                "for the second would round what the first has already rounded; keep one"
            )
        if _ORDER[first.kind] > _ORDER[second.kind]:
            raise RecipeError(
                f"recipe: {first.name}+{second.name}: the order is structure, then pruning, then a quantizer; "
                f"write {second.name}+{first.name}"
            )
        if type(first) is not type(second) and first.kind == second.kind == "prune":
            raise RecipeError(f"recipe: {first.name}+{second.name}: two ways to choose the zeros; keep one")
    for first, second in combinations(work, 2):
        if type(first) is type(second):
            raise RecipeError(f"recipe: {first.name}+{second.name}: the same method twice; keep one")


def _overrides(value: Any) -> tuple[tuple[str, str], ...]:
    """Name patterns and recipes, as a mapping or (in manifests, which sort their keys) as pairs."""
    pairs = list(value.items()) if isinstance(value, Mapping) else _sequence("overrides", value)
    found = []
    for pair in pairs:
        if not isinstance(pair, (list, tuple)) or len(pair) != 2 or not all(isinstance(part, str) for part in pair):
            raise RecipeError(f"recipe: overrides: {pair!r} is not a name pattern and a recipe")
        found.append((_name_pattern("overrides", pair[0]), pair[1]))
    return tuple(found)


def _check_override(pattern: str, target: str) -> None:
    """What is asked for some layers must be something that layers can have each for itself."""
    where = f"recipe: overrides.{pattern}"
    try:
        recipe = _parse_text(target)
    except RecipeError as error:
        raise RecipeError(f"{where}: {str(error).removeprefix('recipe: ')}") from error
    if recipe.structures:
        raise RecipeError(f"{where}: {recipe.structures[0].name} cuts the whole model or nothing")
    if isinstance(recipe.quantizer, Mixed):
        raise RecipeError(
            f"{where}: {recipe.quantizer.name} chooses for the whole model; make it the recipe's quantizer"
        )
    if recipe.lm_head != "keep":
        raise RecipeError(f"{where}: head8 is about the whole model's head; write lm_head: int8 beside the overrides")


def _name_pattern(key: str, pattern: Any) -> str:
    if not isinstance(pattern, str) or not pattern:
        raise RecipeError(f"recipe: {key}: {pattern!r} is not a pattern of module names, such as 'model.layers.0.*'")
    return pattern


def _mapping(key: str, value: Any) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise RecipeError(f"recipe: {key} is not a mapping")
    return value


def _sequence(key: str, value: Any) -> Sequence[Any]:
    if isinstance(value, (str, Mapping)) or not isinstance(value, Sequence):
        raise RecipeError(f"recipe: {key} is not a list")
    return value
