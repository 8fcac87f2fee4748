"""Source and recipe in, a model that answers out: the one door through which every process loads.

`serve.compression.loader` does the work; this file says what a loaded model is. Knows nothing about requests, Ray or
HTTP, nor about how tokens are made.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from serve.compression.artifact import Store
from serve.compression.calibration import Calibration, bundled
from serve.compression.compress import Progress, silent
from serve.compression.effects import By, Effect, measure_effects
from serve.compression.loader import Loader, context_length
from serve.compression.plan import Plan
from serve.compression.recipe import Recipe
from serve.compression.report import LoadReport
from serve.compression.stages import Dense, Mixed
from serve.errors import RecipeError

__all__ = ["LoadedModel", "load", "measure_sensitivity"]


@dataclass(frozen=True)
class LoadedModel:
    """A causal language model in evaluation mode, with what serving it takes.

    `recipe` is what the weights went through: the one asked for, or the source's own where that was compressed already.
    `fingerprint` names the exact weights.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    config: PretrainedConfig
    report: LoadReport
    fingerprint: str
    recipe: Recipe
    context_length: int
    eos_token_ids: tuple[int, ...]


def load(
    source: str,
    recipe: Recipe,
    *,
    device: str = "auto",
    calibration: Calibration | None = None,
    artifacts: Path | None = None,
    progress: Progress = silent,
) -> LoadedModel:
    """Load `source` as `recipe` says. Raise a `SetupError` of one line where it cannot be.

    `calibration` is read by recipes that look at activations; None: the stories that come with the embedded model.
    `artifacts` is the folder of the artifact store; None compresses anew every time. A model that is only read, in the
    type it is stored in, is never copied to the store.
    """
    with Loader.opened(source, recipe, device=device, calibration=calibration, progress=progress) as loader:
        loader.fill(Store(artifacts) if artifacts is not None else None)
    return _result(loader)


def measure_sensitivity(
    source: str,
    recipe: Recipe,
    by: By,
    *,
    device: str = "auto",
    calibration: Calibration | None = None,
    progress: Progress = silent,
) -> list[Effect]:
    """What `recipe` does to each layer or projection of `source` alone, all else in float32; the text is calibration's.

    Raise a `SetupError` of one line where that cannot be measured.
    """
    exact = Recipe(stages=(Dense("fp32"),))
    applied = replace(recipe, stages=(*exact.stages, *recipe.work))
    if recipe.structures or isinstance(recipe.quantizer, Mixed) or not recipe.work:
        raise RecipeError(f"recipe {recipe.name}: sensitivity is of pruning or quantizing a layer; name such a recipe")
    with Loader.opened(source, exact, device=device, progress=progress) as loader:
        loader.fill(None)
        samples = loader.samples(calibration or bundled())
        return measure_effects(loader.skeleton, samples, Plan(applied, loader.plan.device), by, progress=progress)


def _result(loader: Loader) -> LoadedModel:
    assert loader.report is not None
    model, folder = loader.skeleton.model, loader.source.folder
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return LoadedModel(
        model=model,
        tokenizer=loader.tokenizer,
        config=model.config,
        report=loader.report,
        fingerprint=loader.fingerprint,
        recipe=loader.recipe,
        context_length=context_length(model.config, loader.tokenizer),
        eos_token_ids=_eos_token_ids(model, loader.tokenizer),
    )


def _eos_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Every id that ends a text: the generation config's, the model's and the tokenizer's, in that order."""
    found: list[int] = []
    for holder in (model.generation_config, model.config.get_text_config(decoder=True), tokenizer):
        ids = getattr(holder, "eos_token_id", None)
        found += [ids] if isinstance(ids, int) else list(ids or ())
    return tuple(dict.fromkeys(found))
