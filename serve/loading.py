"""Source and recipe in, a model that answers out: the one door through which every process loads.

Finds the checkpoint, builds the empty model, compresses into it and says what that cost. Knows nothing about requests,
Ray or HTTP, nor about how tokens are made.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, GenerationConfig, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from serve.compression import digests
from serve.compression.calibration import Calibration
from serve.compression.checkpoints import Checkpoint, Weights, find_source
from serve.compression.compress import Progress, compress, silent
from serve.compression.formats.linear import CompressedLinear
from serve.compression.memory import prompt_release, release, watch_peak
from serve.compression.plan import Plan
from serve.compression.recipe import Recipe
from serve.compression.report import LoadReport, measure
from serve.compression.skeleton import DTYPES, Skeleton, build
from serve.errors import CheckpointError, UnsupportedHardware

__all__ = ["LoadedModel", "load"]

CODE_VERSION = 1
"""Part of every fingerprint: raised when the same recipe would give other numbers than before."""


@dataclass(frozen=True)
class LoadedModel:
    """A causal language model in evaluation mode, with what serving it takes. `fingerprint` names its exact weights."""

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

    `artifacts` is the folder of the artifact store; None compresses anew every time.
    """
    seconds: dict[str, float] = {}
    target = _device(device)
    with prompt_release(), watch_peak() as peak:
        with _timed(seconds, "open"):
            checkpoint = Checkpoint.open(find_source(source))
            plan = Plan(recipe, target)
            skeleton = build(checkpoint.config, DTYPES[recipe.dtype])
            weights = Weights(checkpoint, skeleton.model)
            tokenizer = _tokenizer(checkpoint.folder)
            fingerprint = _fingerprint(checkpoint, recipe, calibration)
        with _timed(seconds, "compress"):
            compress(skeleton, weights, plan, progress=progress)
        release()
    model = skeleton.model
    _set_generation_config(model, checkpoint.folder)
    return LoadedModel(
        model=model,
        tokenizer=tokenizer,
        config=model.config,
        report=_report(skeleton, recipe, plan, weights, seconds, peak.peak_bytes),
        fingerprint=fingerprint,
        recipe=recipe,
        context_length=_context_length(model.config, tokenizer),
        eos_token_ids=_eos_token_ids(model, tokenizer),
    )


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise UnsupportedHardware(f"device {name}: no CUDA device here; use cpu or auto")
    return torch.device(name)


@contextmanager
def _timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[stage] = time.perf_counter() - start


def _tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except (ValueError, OSError, KeyError, TypeError, ImportError, AttributeError) as error:
        reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
        raise CheckpointError(f"{folder}: its tokenizer cannot be loaded ({reason})") from error
    assert isinstance(tokenizer, PreTrainedTokenizerBase)
    return tokenizer


def _fingerprint(checkpoint: Checkpoint, recipe: Recipe, calibration: Calibration | None) -> str:
    facts: dict[str, Any] = {
        "code": CODE_VERSION,
        "source": digests.of_folder(checkpoint.folder, set(checkpoint.files.values())),
        "recipe": recipe.to_dict(),
        "calibration": calibration.to_dict() if calibration is not None and recipe.needs_calibration else None,
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]


def _set_generation_config(model: PreTrainedModel, folder: Path) -> None:
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)


def _context_length(config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase) -> int:
    text = config.get_text_config(decoder=True)
    for name in ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length"):
        if isinstance(length := getattr(text, name, None), int):
            return length
    return int(tokenizer.model_max_length) if tokenizer.model_max_length < 1 << 24 else 2048


def _eos_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Every id that ends a text: the generation config's, the model's and the tokenizer's, in that order."""
    found: list[int] = []
    text = model.config.get_text_config(decoder=True)
    for ids in (
        getattr(model.generation_config, "eos_token_id", None),
        getattr(text, "eos_token_id", None),
        tokenizer.eos_token_id,
    ):
        found += [ids] if isinstance(ids, int) else list(ids or ())
    return tuple(dict.fromkeys(found))


def _report(
    skeleton: Skeleton, recipe: Recipe, plan: Plan, weights: Weights, seconds: dict[str, float], peak_bytes: int
) -> LoadReport:
    model = skeleton.model
    projections = {name: model.get_submodule(name) for name in skeleton.projections}
    bytes_ = measure(model, projections)
    kernels: dict[str, int] = {}
    for module in projections.values():
        path = module.kernel if isinstance(module, CompressedLinear) else f"dense {recipe.dtype}"
        kernels[path] = kernels.get(path, 0) + 1
    return LoadReport(
        recipe=recipe.name,
        precision=recipe.precision,
        weight_bytes=bytes_.weight_bytes,
        quantization_bytes=bytes_.quantization_bytes,
        embedding_bytes=bytes_.embedding_bytes,
        total_bytes=bytes_.total_bytes,
        parameters=bytes_.parameters,
        bits_per_weight=bytes_.bits_per_weight,
        bits_per_parameter=8 * bytes_.total_bytes / bytes_.parameters,
        compression_ratio=2 * bytes_.parameters / bytes_.total_bytes,
        compression_ratio_fp32=4 * bytes_.parameters / bytes_.total_bytes,
        seconds=seconds,
        peak_load_bytes=peak_bytes,
        kernels=kernels,
        device=str(plan.device),
        uncovered=_uncovered(skeleton) if recipe.quantizer else {},
        unused_keys=weights.unused_keys,
    )


def _uncovered(skeleton: Skeleton) -> dict[str, str]:
    """Weight matrices that stayed in floating point, and why."""
    model, head = skeleton.model, skeleton.head
    reasons: dict[str, str] = {}
    for name, parameter in model.named_parameters():
        module_name = name.rpartition(".")[0]
        module = model.get_submodule(module_name)
        if parameter.dim() < 2 or isinstance(module, torch.nn.Embedding) or module_name == head:
            continue
        if parameter.dim() > 2:
            reasons[name] = "stacked experts"
        elif module_name in skeleton.routers:
            reasons[name] = "router"
        elif module_name in skeleton.projections:
            reasons[name] = "skipped by the recipe"
        else:
            reasons[name] = "outside the decoder's linear layers"
    return reasons
