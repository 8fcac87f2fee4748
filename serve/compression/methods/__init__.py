"""How values are chosen: one method per file, looked up by the recipe's stage and imported when asked for."""

from __future__ import annotations

from importlib import import_module

from serve.compression.method import Pruner, Quantizer
from serve.compression.stages import Stage
from serve.errors import RecipeError

__all__ = ["pruner", "quantizer"]

_QUANTIZERS = {
    "awq": ("quantizers", "AwqMethod"),
    "gptq": ("quantizers", "GptqMethod"),
    "fp8": ("rounding", "Fp8Method"),
    "int8": ("rounding", "Int8Method"),
    "int8-static": ("static", "Int8StaticMethod"),
    "int8-weight": ("rounding", "Int8WeightMethod"),
    "llm-int8": ("rounding", "LlmInt8Method"),
    "nf4": ("rounding", "Nf4Method"),
    "rtn": ("quantizers", "RoundToNearestMethod"),
}
_PRUNERS = {
    "magnitude": ("pruners", "MagnitudePruner"),
    "sparsegpt": ("pruners", "SparseGptPruner"),
    "wanda": ("pruners", "WandaPruner"),
}


def quantizer(stage: Stage) -> Quantizer:
    """The method behind a quantizing stage."""
    method = _find(_QUANTIZERS, stage)
    assert isinstance(method, Quantizer)
    return method


def pruner(stage: Stage) -> Pruner:
    """The method behind a pruning stage."""
    method = _find(_PRUNERS, stage)
    assert isinstance(method, Pruner)
    return method


def _find(table: dict[str, tuple[str, str]], stage: Stage) -> object:
    if stage.method not in table:
        raise RecipeError(f"recipe: {stage.name} cannot be applied by this version; it can: {', '.join(sorted(table))}")
    module, name = table[stage.method]
    return getattr(import_module(f"serve.compression.methods.{module}"), name)(stage)
