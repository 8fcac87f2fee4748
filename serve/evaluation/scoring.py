"""The part of an evaluation that needs a model: what the reference says, and how far a recipe is from it.

Both run in a process of their own, leave plain data behind, and read the same token ids.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from serve.compression.artifact import Store, default_root
from serve.compression.recipe import Recipe
from serve.errors import ConfigError, SetupError
from serve.evaluation.result import Quality, Reference
from serve.evaluation.served import served_logits
from serve.evaluation.setup import Setup
from serve.fresh_process import Progress
from serve.loading import LoadedModel, load
from serve.quality import Divergence, LogitSource, StoredLogits, compare, read_texts, tokenize

__all__ = ["record_reference", "score"]

Records = tuple[tuple[int, ...], ...]


def record_reference(progress: Progress, setup: Setup, folder: Path) -> Reference:
    """Load the reference and write its logits on every record into `folder`, to be read by any number of `score`s."""
    _use_threads(setup)
    loaded = _load(progress, setup, setup.reference, setup.reference_source or setup.source)
    records = _records(setup, loaded)
    _require_room(folder, records, loaded)
    recipe, total_bytes = loaded.recipe, loaded.report.total_bytes
    logits = StoredLogits(served_logits(loaded), folder / "reference.logits")
    itself = _compare(logits, logits, records, progress, "reference")
    stored = StoredLogits(_never, folder / "reference.logits", logits.places)
    del loaded, logits
    noise = _noise_floor(stored, recipe, setup, records, progress)
    return Reference(
        recipe=recipe.name,
        records=records,
        file=folder / "reference.logits",
        places=stored.places,
        total_bytes=total_bytes,
        perplexity=itself.perplexity_reference.to_dict(),
        accuracy=itself.accuracy.reference,
        noise_floor=noise,
    )


def score(progress: Progress, setup: Setup, recipe: Recipe, reference: Reference) -> Quality:
    """Load `recipe` and compare it with the stored reference, token by token."""
    _use_threads(setup)
    loaded = _load(progress, setup, recipe, setup.source)
    if setup.reference_source is not None and _records(setup, loaded) != reference.records:
        raise SetupError(
            f"{setup.source} and {setup.reference_source} read the text as different tokens: not comparable"
        )
    stored = StoredLogits(_never, reference.file, reference.places)
    divergence = _compare(stored, served_logits(loaded), reference.records, progress, "score")
    quality = Quality(loaded.recipe.name, divergence.to_dict(), loaded.report.to_dict())
    if not setup.fresh and setup.reference_source is None:
        _remember(loaded, quality.noted(reference.recipe))
    return quality


def _remember(loaded: LoadedModel, facts: dict[str, Any]) -> None:
    """Into the artifact's manifest, so that a server that loads these weights knows what to expect of them. A shorter
    text than the one that spoke last is not listened to.
    """
    store = Store(default_root())
    if not store.holds(loaded.fingerprint):
        return
    known = loaded.report.quality.get("tokens", 0)
    if facts["tokens"] >= known and all(math.isfinite(v) for v in facts.values() if isinstance(v, float)):
        with store.locked(loaded.fingerprint):
            store.open(loaded.fingerprint).note_quality(facts)


def _load(progress: Progress, setup: Setup, recipe: Recipe, source: str) -> LoadedModel:
    artifacts = None if setup.fresh else default_root()
    return load(
        source, recipe, device=setup.device, calibration=setup.calibration, artifacts=artifacts, progress=progress
    )


def _records(setup: Setup, loaded: LoadedModel) -> Records:
    texts = read_texts(setup.text, setup.limit)
    records = tuple(map(tuple, tokenize(loaded.tokenizer, texts, loaded.context_length)))
    scored = tuple(ids for ids in records if len(ids) > 1)
    if not scored:
        raise ConfigError("text", f"{setup.text}: no record has two tokens, so there is nothing to score")
    return scored


def _require_room(folder: Path, records: Records, loaded: LoadedModel) -> None:
    needed_bytes = 4 * sum(map(len, records)) * int(loaded.config.get_text_config().vocab_size)
    free_bytes = shutil.disk_usage(folder).free
    if needed_bytes > free_bytes:
        raise SetupError(
            f"the reference's logits take {needed_bytes / 2**30:.1f} GiB and {folder} has {free_bytes / 2**30:.1f}; "
            "score fewer records with --limit, or set TMPDIR to a larger disk"
        )


def _compare(
    reference: LogitSource, variant: LogitSource, records: Records, progress: Progress, stage: str
) -> Divergence:
    def told() -> Iterator[Sequence[int]]:
        for done, ids in enumerate(records):
            progress(stage, done, len(records))
            yield ids

    return compare(reference, variant, told())


def _noise_floor(
    stored: LogitSource, recipe: Recipe, setup: Setup, records: Records, progress: Progress
) -> dict[str, Any] | None:
    """The same weights in another floating type: 32 bits against 16, in one direction or the other.

    They are read anew: what made the stored logits may have been compiled, and has no plain form any more.
    """
    if recipe.work or recipe.lm_head != "keep":
        return None
    loaded = _load(progress, setup, recipe, setup.reference_source or setup.source)
    dtype = torch.bfloat16 if recipe.dtype == "fp32" else torch.float32
    for parameter in loaded.model.parameters():  # the rotary tables are buffers, and stay as exact as they are
        parameter.data = parameter.data.to(dtype)
    found = _compare(stored, served_logits(loaded), records, progress, "noise floor")
    return {
        "dtype": "bf16" if dtype == torch.bfloat16 else "fp32",
        "kl_divergence": found.kl_divergence.mean,
        "top1_agreement": found.top1_agreement,
        "perplexity_ratio": found.perplexity_ratio,
    }


def _use_threads(setup: Setup) -> None:
    if setup.threads is not None:
        torch.set_num_threads(setup.threads)


def _never(ids: Sequence[int]) -> Tensor:
    raise AssertionError("every record was stored by the reference")
