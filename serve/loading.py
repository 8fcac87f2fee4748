"""Source and recipe in, a model that answers out: the one door through which every process loads.

Finds the source and fingerprints it; then either maps a saved artifact, or reads the checkpoint, compresses it and
saves what came out. Knows nothing about requests, Ray or HTTP, nor about how tokens are made.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer, GenerationConfig, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from serve.compression import digests
from serve.compression.account import account
from serve.compression.activations import BlockActivations
from serve.compression.artifact import Artifact, Store
from serve.compression.calibration import Calibration, bundled
from serve.compression.checkpoints import Checkpoint, Source, Weights
from serve.compression.compress import Progress, Sink, compress, silent
from serve.compression.memory import PeakMemory, prompt_release, release, watch_peak
from serve.compression.plan import Plan
from serve.compression.recipe import Recipe
from serve.compression.report import LoadReport
from serve.compression.restore import restore
from serve.compression.skeleton import DTYPES, Skeleton, build
from serve.errors import ArtifactError, CheckpointError, UnsupportedHardware

__all__ = ["LoadedModel", "load"]

CODE_VERSION = 1
"""Part of every fingerprint: raised when the same recipe would give other numbers than before."""

_log = logging.getLogger(__name__)


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

    `calibration` is read by recipes that look at activations; None: the stories that come with the embedded model.
    `artifacts` is the folder of the artifact store; None compresses anew every time. A model that is only read, in the
    type it is stored in, is never copied to the store.
    """
    with prompt_release(), watch_peak() as peak:
        job = _Load(source, recipe, _device(device), calibration, progress, peak)
        if artifacts is None or not job.changes_weights:
            job.compress(None)
        else:
            job.through(Store(artifacts))
        release()
        return job.result()


class _Load:
    """One load: what is known before any weight is read, then the filled model and its report."""

    def __init__(
        self,
        source: str,
        recipe: Recipe,
        device: torch.device,
        calibration: Calibration | None,
        progress: Progress,
        peak: PeakMemory,
    ) -> None:
        self.recipe, self.progress, self.peak = recipe, progress, peak
        self.calibration = (calibration or bundled()) if recipe.needs_calibration else None
        self.seconds: dict[str, float] = {}
        with _timed(self.seconds, "open"):
            self.source = Source.find(source)
            self.plan = Plan(recipe, device)
            self.facts = _facts(self.source, recipe, self.calibration)
            self.fingerprint = _fingerprint(self.facts)
            self.skeleton = self._build()
            self.tokenizer = _tokenizer(self.source.folder)
        self.report: LoadReport | None = None

    @property
    def changes_weights(self) -> bool:
        converts = self.source.stored_dtype != DTYPES[self.recipe.dtype]
        return converts or bool(self.recipe.work) or self.recipe.lm_head != "keep"

    def through(self, store: Store) -> None:
        """A hit where the artifact is there and sound; else it is made, by one process at a time."""
        if store.holds(self.fingerprint) and self._hit(store):
            return
        self.progress("wait", 0, 1)
        with store.locked(self.fingerprint):
            if store.holds(self.fingerprint) and self._hit(store):
                return
            draft = store.draft(self.fingerprint)
            report = self.compress(draft)
            with _timed(self.seconds, "save"):
                store.finish(draft, {**self.facts, "recipe_name": self.recipe.name, "report": report.to_dict()})

    def compress(self, sink: Sink | None) -> LoadReport:
        """Read the checkpoint and apply the recipe."""
        with _timed(self.seconds, "compress"):
            weights = Weights(Checkpoint.open(self.source), self.skeleton.model)
            activations = self._activations()
            compress(self.skeleton, weights, self.plan, activations=activations, sink=sink, progress=self.progress)
        self.report = account(
            self.skeleton,
            self.plan,
            self.seconds,
            self.peak.peak_bytes,
            calibration_tokens=activations.tokens if activations is not None else 0,
            unused_keys=weights.unused_keys,
        )
        return self.report

    def _activations(self) -> BlockActivations | None:
        """The calibration text in front of the first block, for recipes that want it."""
        if self.calibration is None:
            return None
        context_tokens = _context_length(self.source.config, self.tokenizer)
        samples = self.calibration.samples(lambda text: list(self.tokenizer(text)["input_ids"]), context_tokens)
        return BlockActivations(self.skeleton, samples, self.plan.device)

    def _hit(self, store: Store) -> bool:
        """Fill the model from the store; what turns out to be damaged is thrown away and the model built anew."""
        try:
            with _timed(self.seconds, "map"):
                self._restore(store.open(self.fingerprint))
        except ArtifactError as error:
            _log.warning("%s; making it anew", error)
            store.discard(self.fingerprint)
            self.skeleton = self._build()
            return False
        return True

    def _restore(self, artifact: Artifact) -> None:
        reader = _Mapping(artifact)
        restore(self.skeleton, self.plan, reader.read)
        saved = LoadReport.from_dict(artifact.manifest["report"])
        self.report = account(
            self.skeleton,
            self.plan,
            self.seconds,
            self.peak.peak_bytes,
            mapped=frozenset(reader.addresses),
            artifact_hit=True,
            calibration_tokens=saved.calibration_tokens,
            unused_keys=saved.unused_keys,
        )

    def result(self) -> LoadedModel:
        assert self.report is not None
        model, folder = self.skeleton.model, self.source.folder
        if (folder / "generation_config.json").is_file():
            model.generation_config = GenerationConfig.from_pretrained(folder)
        return LoadedModel(
            model=model,
            tokenizer=self.tokenizer,
            config=model.config,
            report=self.report,
            fingerprint=self.fingerprint,
            recipe=self.recipe,
            context_length=_context_length(model.config, self.tokenizer),
            eos_token_ids=_eos_token_ids(model, self.tokenizer),
        )

    def _build(self) -> Skeleton:
        return build(self.source.config, DTYPES[self.recipe.dtype])


@dataclass
class _Mapping:
    """Reads an artifact and remembers where its tensors lie, to tell mapped memory from the process's own."""

    artifact: Artifact
    addresses: set[int] = field(default_factory=set)

    def read(self, part: str) -> Mapping[str, Tensor]:
        tensors = self.artifact.read(part)
        self.addresses |= {tensor.data_ptr() for tensor in tensors.values() if tensor.numel()}
        return tensors


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise UnsupportedHardware(f"device {name}: no CUDA device here; use cpu or auto")
    return torch.device(name)


@contextmanager
def _timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    start = time.perf_counter()
    try:
        yield
    finally:
        seconds[stage] = time.perf_counter() - start


def _facts(source: Source, recipe: Recipe, calibration: Calibration | None) -> dict[str, Any]:
    """Everything that decides the weights."""
    return {
        "code_version": CODE_VERSION,
        "source": digests.of_folder(source.folder, source.weight_files),
        "recipe": recipe.to_dict(),
        "calibration": calibration.to_dict() if calibration is not None else None,
    }


def _fingerprint(facts: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]


def _tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except (ValueError, OSError, KeyError, TypeError, ImportError, AttributeError) as error:
        reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
        raise CheckpointError(f"{folder}: its tokenizer cannot be loaded ({reason})") from error
    assert isinstance(tokenizer, PreTrainedTokenizerBase)
    return tokenizer


def _context_length(config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase) -> int:
    text = config.get_text_config(decoder=True)
    for name in ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length"):
        if isinstance(length := getattr(text, name, None), int):
            return length
    return int(tokenizer.model_max_length) if tokenizer.model_max_length < 1 << 24 else 2048


def _eos_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Every id that ends a text: the generation config's, the model's and the tokenizer's, in that order."""
    found: list[int] = []
    for holder in (model.generation_config, model.config.get_text_config(decoder=True), tokenizer):
        ids = getattr(holder, "eos_token_id", None)
        found += [ids] if isinstance(ids, int) else list(ids or ())
    return tuple(dict.fromkeys(found))
