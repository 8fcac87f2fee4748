"""Which treatment each layer gets: the recipe's stages resolved to methods, with skipped and overridden layers.

Resolving happens before any weight is read, so that a recipe this machine cannot run fails at once.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

import torch

from serve.compression import methods
from serve.compression.hardware import check_dtype
from serve.compression.method import Need, Pruner, Quantizer
from serve.compression.methods.pruners import ZerosStay
from serve.compression.methods.storage import DenseStorage, SparseStorage
from serve.compression.recipe import Recipe
from serve.compression.skeleton import DTYPES
from serve.compression.stages import Gptq, Int8, Int8Weight, Mixed
from serve.errors import RecipeError

__all__ = ["Plan", "Treatment", "check_patterns"]


@dataclass(frozen=True)
class Treatment:
    """What happens to one projection: pruners in order, then a quantizer; neither means that it stays dense."""

    pruners: tuple[Pruner, ...] = ()
    quantizer: Quantizer | None = None

    @property
    def needs(self) -> Need:
        wants = [pruner.needs for pruner in self.pruners] + ([self.quantizer.needs] if self.quantizer else [])
        return max(wants, default=Need.NOTHING)

    @property
    def sequential(self) -> bool:
        return self.quantizer is None or self.quantizer.sequential

    @property
    def is_dense(self) -> bool:
        return not self.pruners and self.quantizer is None


class Plan:
    """The recipe as methods, checked against a device. `pruned`: the zeros that are there stand for its pruners."""

    def __init__(self, recipe: Recipe, device: torch.device, *, pruned: bool = False) -> None:
        check_dtype(DTYPES[recipe.dtype], device)
        self.pruned = pruned
        self.recipe, self.device = recipe, device
        self._default = self._treat(recipe)
        self._overrides = [(pattern, self._override(target)) for pattern, target in recipe.overrides]
        # Chosen for its accuracy, which 16-bit logits would spoil: see formats/head.py.
        self.float32_head = isinstance(recipe.quantizer, Int8Weight) and recipe.dtype != "fp32"
        self.head = self._check(methods.quantizer(Int8())) if recipe.lm_head == "int8" else None

    def treatment(self, name: str) -> Treatment:
        """The treatment of the projection `name`."""
        if any(fnmatchcase(name, pattern) for pattern in self.recipe.skip):
            return Treatment()
        return next((found for pattern, found in self._overrides if fnmatchcase(name, pattern)), self._default)

    def _override(self, target: str) -> Treatment:
        recipe = Recipe.parse(target)
        if not recipe.work and recipe.dtype != self.recipe.dtype:
            return Treatment(self._default.pruners, DenseStorage(DTYPES[recipe.dtype]))
        treatment = self._treat(recipe)
        return Treatment(self._default.pruners + treatment.pruners, treatment.quantizer)

    def _treat(self, recipe: Recipe) -> Treatment:
        if isinstance(recipe.quantizer, Mixed):  # its choices are overrides; this is for what was never measured
            recipe = replace(recipe, stages=tuple(Gptq() if isinstance(s, Mixed) else s for s in recipe.stages))
        stages = [stage for stage in recipe.work if stage.kind == "prune"]
        pruners: tuple[Pruner, ...] = tuple(ZerosStay() if self.pruned else methods.pruner(stage) for stage in stages)
        if recipe.quantizer is None:
            return Treatment(pruners, SparseStorage() if pruners else None)
        return Treatment(pruners, self._check(methods.quantizer(recipe.quantizer)))

    def _check(self, quantizer: Quantizer) -> Quantizer:
        quantizer.check(self.device, DTYPES[self.recipe.dtype])
        return quantizer


def check_patterns(recipe: Recipe, projections: Collection[str], modules: Collection[str]) -> None:
    """Raise `RecipeError` naming a pattern of `skip` or `overrides` that means nothing in this model: a typing error,
    most likely, that would otherwise be served as if it had been heeded.

    Skipping what is left alone anyway (the head, an embedding) is no error.
    """
    asked = [("skip", pattern, modules) for pattern in recipe.skip]
    asked += [("overrides", pattern, projections) for pattern, _ in recipe.overrides]
    for key, pattern, names in asked:
        if not any(fnmatchcase(name, pattern) for name in names):
            example = min(projections, default="none")
            raise RecipeError(f"recipe: {key}: {pattern!r} matches no layer of this model; they are called {example}")
