"""A student out of its teacher: cut, pruned, or a choice of its layers, dense and in float32; and a folder for it.

What is chosen, and how the rest is fitted to make up for it, is `serve.compression.structure`'s; knows no training.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedTokenizerBase
from transformers.utils import logging

from serve.compression.activations import BlockActivations
from serve.compression.calibration import Calibration
from serve.compression.checkpoints import Checkpoint, Weights
from serve.compression.compress import Progress, Reader, compress, silent
from serve.compression.loader import context_length
from serve.compression.plan import Plan, Treatment
from serve.compression.recipe import Recipe
from serve.compression.sizes import choose_layers
from serve.compression.skeleton import DTYPES, Skeleton, build
from serve.compression.source import Source
from serve.compression.stages import Dense
from serve.compression.structure import CutWeights, cut
from serve.errors import RecipeError
from serve.saving import copy_companions

__all__ = ["Origin", "make_student", "pruned_projections", "pruning", "save_student"]


@dataclass(frozen=True)
class Origin:
    """What a student is made of: a dense model's folder, opened, and text to choose by."""

    source: Source
    tokenizer: PreTrainedTokenizerBase
    calibration: Calibration
    device: torch.device

    def samples(self) -> list[list[int]]:
        context_tokens = context_length(self.source.config, self.tokenizer)
        return self.calibration.samples(lambda text: list(self.tokenizer(text)["input_ids"]), context_tokens)


def make_student(
    origin: Origin,
    sizes: Sequence[PretrainedConfig] = (),
    *,
    layers: Sequence[int] | None = None,
    pruned: Recipe | None = None,
    progress: Progress = silent,
) -> Skeleton:
    """The origin with only these `layers`, cut to each of `sizes` in turn, then pruned as `pruned` says; all dense."""
    skeleton, weights = _opened(origin)
    if layers is not None:
        skeleton, weights = _with_layers(skeleton, weights, layers)
    for smaller in sizes:
        weights = cut(skeleton, weights, smaller, _activations(skeleton, origin), progress)
        skeleton = build(smaller, torch.float32)
    recipe = pruned or Recipe(stages=(Dense("fp32"),))
    activations = _activations(skeleton, origin) if recipe.calibrates_layers else None
    compress(skeleton, weights, _DensePlan(recipe, origin.device), activations=activations, progress=progress)
    return skeleton


def pruning(recipe: Recipe) -> Recipe | None:
    """The part of a recipe that removes single weights, as it is applied to a float32 student."""
    stages = tuple(stage for stage in recipe.work if stage.kind == "prune")
    return Recipe(stages=(Dense("fp32"), *stages), skip=recipe.skip) if stages else None


def pruned_projections(skeleton: Skeleton, recipe: Recipe | None) -> list[str]:
    """The layers that `recipe` prunes."""
    if recipe is None:
        return []
    plan = Plan(recipe, torch.device("cpu"))
    return [name for name in skeleton.projections if plan.treatment(name).pruners]


def save_student(model: Any, origin: Source, out: Path, dtype: torch.dtype = torch.float32) -> None:
    """An ordinary checkpoint in `dtype`, whole or not at all, with the tokenizer and all else that `origin` has."""
    aside = out.with_name(f"{out.name}.aside")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    copy_companions(origin.folder, aside)
    saved = model if dtype == torch.float32 else deepcopy(model).to(dtype)
    with _no_bars():
        saved.save_pretrained(aside)
    if (generation := origin.folder / "generation_config.json").is_file():
        (aside / generation.name).write_bytes(generation.read_bytes())
    aside.rename(out)


@contextmanager
def _no_bars() -> Iterator[None]:
    """Transformers shows bars of its own, which would stand among ours."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()  # type: ignore[no-untyped-call]


class _DensePlan(Plan):
    """Prunes, and stores the zeros like any other number."""

    def treatment(self, name: str) -> Treatment:
        return Treatment(super().treatment(name).pruners)


def _opened(origin: Origin) -> tuple[Skeleton, Reader]:
    skeleton = build(origin.source.config, DTYPES["fp32"])
    return skeleton, Weights(Checkpoint.open(origin.source), skeleton.model)


def _with_layers(skeleton: Skeleton, weights: Reader, layers: Sequence[int]) -> tuple[Skeleton, Reader]:
    names = list(skeleton.blocks)
    if not layers or any(not 0 <= layer < len(names) for layer in layers) or list(layers) != sorted(set(layers)):
        raise RecipeError(f"layers {', '.join(map(str, layers))}: name some of 0 to {len(names) - 1}, in rising order")
    smaller = build(choose_layers(skeleton.model.config, layers), torch.float32)
    kept = dict(zip(smaller.blocks, [names[layer] for layer in layers], strict=True))
    return smaller, CutWeights(weights, kept)


def _activations(skeleton: Skeleton, origin: Origin) -> BlockActivations:
    return BlockActivations(skeleton, origin.samples(), origin.device)
