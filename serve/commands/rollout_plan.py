"""From a YAML file and flags to the body of `POST /admin/rollouts`. The server checks what the plan means."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from serve.errors import SetupError

__all__ = ["read_expected", "read_plan"]

_STEPS = ({"weight": 5.0}, {"weight": 25.0}, {"weight": 50.0})


def read_plan(
    file: Path | None,
    flags: Mapping[str, Any],
    steps: Sequence[str],
    guards: Sequence[str],
    caps: Sequence[str],
    *,
    shadow: float | None,
    approval: bool,
) -> dict[str, Any]:
    """The file's plan with the flags over it. Raises SetupError where a flag or the file cannot be read."""
    body = _yaml(file) if file else {}
    body |= {key: value for key, value in flags.items() if value is not None}
    if not body.get("to"):
        raise SetupError("say which variant with --to, or `to:` in the plan")
    if steps:
        body["steps"] = [_step(step) for step in steps]
    if approval:
        *before, last = body.get("steps", _STEPS)
        last = dict(last) if isinstance(last, Mapping) else {"weight": last}
        body["steps"] = [*before, {**last, "gate": "approval"}]
    if shadow is not None:
        body["shadow"] = {"rate": shadow} if shadow else None
    if guards or caps:
        body["guards"] = _guards(body.get("guards") or {}, guards, caps)
    return body


def read_expected(file: Path, variant: str, precision: str | None) -> Mapping[str, Any]:
    """The canary's row of what `halftone evaluate --json` printed, or the only one there is."""
    try:
        rows = json.loads(file.read_text(encoding="utf-8"))["rows"]
        by_recipe = {str(row["recipe"]): row for row in rows}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SetupError(f"{file} is not what `halftone evaluate --json` prints: {error}") from error
    for name in (variant, precision):
        if name in by_recipe:
            return dict(by_recipe[name])
    if len(by_recipe) == 1:
        return dict(next(iter(by_recipe.values())))
    raise SetupError(f"{file} has no row for {precision or variant}; it has {', '.join(by_recipe) or 'none'}")


def _yaml(file: Path) -> dict[str, Any]:
    try:
        document = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise SetupError(f"cannot read {file}: {error}") from error
    if not isinstance(document, dict):
        raise SetupError(f"{file}: a plan is a mapping, as in docs/ROLLOUTS.md")
    return document


def _step(text: str) -> dict[str, float]:
    names = ("weight", "min_samples", "hold_s")
    parts = text.split(":")
    try:
        return {name: _number(part) for name, part in zip(names[: len(parts)], parts, strict=True)}
    except ValueError:
        raise SetupError(f"--step {text}: must be WEIGHT[:MIN_SAMPLES[:HOLD_S]], as 5:200:60") from None


def _guards(given: Mapping[str, Any], margins: Sequence[str], caps: Sequence[str]) -> dict[str, Any]:
    guards = dict(given)
    for text in margins:
        name, value = _pair("--guard", text)
        guards[name] = None if value == "off" else {**_mapping(guards.get(name)), "margin": _of("--guard", text, value)}
    for text in caps:
        name, value = _pair("--cap", text)
        guards[name] = {**_mapping(guards.get(name)), "cap": _of("--cap", text, value)}
    return guards


def _mapping(guard: Any) -> dict[str, Any]:
    if isinstance(guard, Mapping):
        return dict(guard)
    return {} if guard is None else {"margin": guard}


def _pair(flag: str, text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals:
        raise SetupError(f"{flag} {text}: must be NAME=NUMBER")
    return name, value


def _of(flag: str, text: str, value: str) -> float:
    try:
        return _number(value)
    except ValueError:
        raise SetupError(f"{flag} {text}: {value!r} is no number") from None


def _number(text: str) -> float:
    value = float(text)
    return int(value) if value.is_integer() else value
