"""The YAML file that an operator writes, as frozen values: what is served, and who gets what at first.

Every key that is unknown, missing or wrong fails by its path, with the names that would have been right. What is left
out is decided by `Variant.resolved` on the machine at hand. This file opens no model and knows no torch and no Ray.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic_core import PydanticCustomError

from serve.api import ApiSettings, Keys, Limits
from serve.api.settings import StickySource
from serve.compression.calibration import Calibration
from serve.compression.hub_text import PREFIX as HUB_PREFIX
from serve.compression.recipe import Recipe
from serve.engine.settings import EngineSettings
from serve.errors import ConfigError, HalftoneError
from serve.pairs import DriftSettings
from serve.rollout import Split
from serve.rollout.settings import RolloutSettings, Webhook
from serve.variant import Resources, Variant

__all__ = ["Config", "default_config", "load_config", "parse_config", "serve_source"]

_DEFAULT = Path(__file__).with_name("default.yaml")
_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"
"""What may stand in a metric's label, a header and after the @ of NAME@VARIANT."""
_MODEL_NAME = r"^[A-Za-z0-9][A-Za-z0-9._/-]{0,127}$"


@dataclass(frozen=True)
class Config:
    """One model, its variants in the order of the file, and the traffic table to begin with."""

    model_name: str
    variants: tuple[Variant, ...]
    split: Split
    api: ApiSettings = field(default_factory=ApiSettings)
    rollouts: RolloutSettings = field(default_factory=RolloutSettings)
    drift: DriftSettings | None = None
    """None: nothing is scored."""
    co2_grams_per_kwh: float | None = None
    """Of the electricity that the machines run on; None: not stated, so no CO2 is told."""
    ingresses: int = 1
    """How many processes take requests."""

    def resolved(self, *, cpus: float, gpus: float) -> Config:
        """With every "auto" decided for a machine of that size."""
        count = sum(variant.resources.replicas for variant in self.variants)
        decided = [v.resolved(cpus=cpus, gpus=gpus, replicas=count, ingresses=self.ingresses) for v in self.variants]
        return replace(self, variants=tuple(decided))


def load_config(path: Path) -> Config:
    """Read a YAML file. Raises ConfigError: a missing file, broken YAML, or a key by its path."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError("", f"cannot read {path}: {getattr(error, 'strerror', None) or 'not UTF-8 text'}") from error
    try:
        return parse_config(yaml.safe_load(text))
    except yaml.YAMLError as error:
        where = getattr(error, "problem_mark", None)
        line = f", line {where.line + 1}" if where else ""
        raise ConfigError("", f"{path}{line}: not valid YAML: {getattr(error, 'problem', None) or error}") from error


def default_config() -> Config:
    """What `halftone serve` runs when it is told nothing: the embedded model."""
    return load_config(_DEFAULT)


def serve_source(source: str, recipes: tuple[str, ...]) -> Config:
    """A whole configuration from a model alone: one variant per recipe, named after it, all traffic on the first."""
    name = source.removeprefix("builtin:").rstrip("/").rsplit("/", 1)[-1]
    variants = [{"name": recipe.replace("+", "_").replace(":", "-"), "recipe": recipe} for recipe in recipes]
    return parse_config({"model": {"name": name, "source": source}, "variants": variants})


def parse_config(document: object) -> Config:
    """Check a document that YAML or JSON has already taken apart."""
    if not isinstance(document, Mapping):
        raise ConfigError("", f"the configuration must be a mapping with {_listed(_File)}")
    try:
        file = _File.model_validate(document)
    except ValidationError as error:
        raise _first_error(error) from None
    return file.build()


def _owned(read: Callable[[Any], Any]) -> BeforeValidator:
    """A value that another layer reads: its error becomes pydantic's, which knows the path that led here."""

    def validate(value: Any) -> Any:
        try:
            return read(value)
        except HalftoneError as error:
            raise PydanticCustomError("halftone", "{message}", {"message": error.message, "error": error}) from error

    return BeforeValidator(validate)


def _engine(value: object) -> EngineSettings:
    return EngineSettings(**_known_keys(value, EngineSettings))


def _calibration(value: object) -> Calibration:
    given = _known_keys(value, Calibration)
    if not isinstance(given.get("file"), str):
        raise ConfigError("file", "must name the text to calibrate on")
    for key in ("num_samples", "max_tokens", "seed"):
        if key in given and (isinstance(given[key], bool) or not isinstance(given[key], int)):
            raise ConfigError(key, f"must be a whole number, got {given[key]!r}")
    hub = given["file"].startswith(HUB_PREFIX)
    file = Path(given["file"]) if hub else Path(given["file"]).expanduser().resolve()
    return Calibration(**{**given, "file": file})


def _limits(value: object) -> Limits:
    given = _known_keys(value, Limits)
    for key, number in given.items():
        if isinstance(number, bool) or not isinstance(number, int | float) or number <= 0:
            raise ConfigError(key, f"must be a number above 0, got {number!r}")
    return Limits(**given)


def _known_keys(value: object, settings: type[Any]) -> dict[str, Any]:
    names = [entry.name for entry in fields(settings)]
    if not isinstance(value, Mapping):
        raise ConfigError("", f"must be a mapping with any of {', '.join(names)}")
    for key in value:
        if key not in names:
            raise ConfigError(str(key), _unknown(str(key), names))
    return dict(value)


def _auto(value: object) -> object:
    return None if value == "auto" else value


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, arbitrary_types_allowed=True)


class _Model(_Section):
    name: Annotated[str, Field(pattern=_MODEL_NAME)]
    source: Annotated[str, Field(min_length=1)]


class _VariantEntry(_Section):
    name: Annotated[str, Field(pattern=_NAME)]
    recipe: Annotated[Recipe, _owned(Recipe.parse)]
    source: Annotated[str, Field(min_length=1)] | None = None
    device: Literal["auto", "cpu", "cuda"] = "auto"
    replicas: Annotated[int, Field(ge=1, le=1000)] = 1
    num_cpus: Annotated[float | None, BeforeValidator(_auto), Field(ge=0)] = None
    num_gpus: Annotated[float | None, BeforeValidator(_auto), Field(ge=0)] = None
    engine: Annotated[EngineSettings, _owned(_engine)] = EngineSettings()
    calibration: Annotated[Calibration | None, _owned(_calibration)] = None

    def build(self, model: _Model) -> Variant:
        resources = Resources(self.replicas, self.num_cpus, self.num_gpus)
        source = _located(self.source or model.source)
        return Variant(self.name, source, self.recipe, self.device, self.engine, resources, self.calibration)


class _Traffic(_Section):
    stable: str | None = None
    weights: dict[str, Annotated[float, Field(ge=0, le=100)]] | None = None
    sticky: StickySource = "user"
    shadow: dict[str, Annotated[float, Field(ge=0, le=1)]] | None = None
    salt: str = ""
    holdout: Annotated[float, Field(ge=0, le=100)] = 0.0


class _Drift(_Section):
    reference: str | None = None
    sample_rate: Annotated[float, Field(ge=0, le=1)] = 0.05
    max_busy_ratio: Annotated[float | None, Field(gt=0, le=1)] = None


class _Energy(_Section):
    co2_grams_per_kwh: Annotated[float | None, Field(ge=0, le=10_000)] = None


class _Api(_Section):
    keys: list[Annotated[str, Field(min_length=8)]] = []
    admin_key: Annotated[str, Field(min_length=8)] | None = None
    limits: Annotated[Limits, _owned(_limits)] = Limits()
    replicas: Annotated[int, Field(ge=1, le=1000)] = 1

    def build(self, sticky: StickySource) -> ApiSettings:
        return ApiSettings(Keys.of(self.keys, self.admin_key), self.limits, sticky)


class _Webhook(_Section):
    url: Annotated[str, Field(pattern=r"^https?://[^\s/@]+(/\S*)?$")]
    secret: Annotated[str, Field(min_length=8)]


class _Rollouts(_Section):
    store: Annotated[str, Field(pattern=r"^(sqlite|postgresql)[a-z+]*://")] | None = None
    webhooks: Annotated[list[_Webhook], Field(max_length=32)] = []
    recorded_parcels: Annotated[int, Field(ge=0, le=1_000_000)] = 2000

    def build(self) -> RolloutSettings:
        hooks = tuple(Webhook(hook.url, hook.secret) for hook in self.webhooks)
        return RolloutSettings(self.store, hooks, self.recorded_parcels)


class _File(_Section):
    model: _Model
    variants: Annotated[list[_VariantEntry], Field(min_length=1)]
    traffic: _Traffic = _Traffic()
    drift: _Drift | None = None
    energy: _Energy = _Energy()
    api: _Api = _Api()
    rollouts: _Rollouts = _Rollouts()

    def build(self) -> Config:
        names = [entry.name for entry in self.variants]
        for index, name in enumerate(names):
            if name in names[:index]:
                raise ConfigError(f"variants[{index}].name", f"{name!r} is given twice")
        return Config(
            model_name=self.model.name,
            variants=tuple(entry.build(self.model) for entry in self.variants),
            split=self._split(names),
            api=self.api.build(self.traffic.sticky),
            rollouts=self.rollouts.build(),
            drift=self._drift_settings(names),
            co2_grams_per_kwh=self.energy.co2_grams_per_kwh,
            ingresses=self.api.replicas,
        )

    def _drift_settings(self, names: list[str]) -> DriftSettings | None:
        """The reference, unless told otherwise: the stable variant."""
        if self.drift is None:
            return None
        reference = self.drift.reference or self._split(names).stable
        if reference not in names:
            raise ConfigError("drift.reference", _unknown(reference, names, "variant"))
        return DriftSettings(reference, self.drift.sample_rate, self.drift.max_busy_ratio)

    def _split(self, names: list[str]) -> Split:
        """The stable variant, unless told otherwise: the one with the most traffic, else the first."""
        weights, stable, shadow = self.traffic.weights, self.traffic.stable, self.traffic.shadow or {}
        given = (("weights", list(weights or ())), ("stable", [stable] if stable else []), ("shadow", list(shadow)))
        for key, named in given:
            for name in named:
                if name not in names:
                    raise ConfigError(f"traffic.{key}", _unknown(name, names, "variant"))
        stable = stable or (max(weights, key=weights.__getitem__) if weights else names[0])
        dealt = {name: (weights or {stable: 100.0}).get(name, 0.0) for name in names}
        return Split(stable, dealt, salt=self.traffic.salt, holdout=self.traffic.holdout, shadow=shadow)


def _located(source: str) -> str:
    """A folder that exists here is made absolute: replicas run in other working directories."""
    return str(Path(source).resolve()) if not source.startswith("builtin:") and Path(source).is_dir() else source


def _first_error(error: ValidationError) -> ConfigError:
    """The first complaint in our words: its path, and what to write instead."""
    first = min(error.errors(include_url=False), key=lambda each: each["type"] == "missing")
    path = _path(first["loc"])
    raised = first.get("ctx", {}).get("error")
    if isinstance(raised, ConfigError) and raised.path:
        return ConfigError(f"{path}.{raised.path}", raised.message.removeprefix(f"{raised.path}: "))
    if isinstance(raised, HalftoneError):
        return ConfigError(path, raised.message.removeprefix("recipe: "))
    if first["type"] == "extra_forbidden":
        return ConfigError(path, _unknown(str(first["loc"][-1]), list(_section(first["loc"][:-1]).model_fields)))
    if first["type"] == "missing":
        return ConfigError(path, "is missing")
    got = "" if first["loc"][0] in ("api", "rollouts") else f", got {first['input']!r}"  # keys are secrets
    return ConfigError(path, f"{first['msg'][0].lower()}{first['msg'][1:]}{got}")


def _path(location: tuple[int | str, ...]) -> str:
    parts = [f"[{part}]" if isinstance(part, int) else f".{part}" for part in location]
    return "".join(parts).removeprefix(".")


def _section(location: tuple[int | str, ...]) -> type[_Section]:
    """The section that a location lies in: `("variants", 1)` is a variant's entry."""
    sections: dict[str, type[_Section]] = {
        "model": _Model, "variants": _VariantEntry, "traffic": _Traffic, "drift": _Drift, "api": _Api,
        "rollouts": _Rollouts, "energy": _Energy,
    }  # fmt: skip
    if location[:2] == ("rollouts", "webhooks"):
        return _Webhook
    return sections[str(location[0])] if location else _File


def _unknown(name: str, allowed: list[str], what: str = "key") -> str:
    near = difflib.get_close_matches(name, allowed, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return f"unknown {what} {name!r}; {hint}allowed: {', '.join(allowed)}"


def _listed(section: type[_Section]) -> str:
    return ", ".join(section.model_fields)
