"""One load under way: what is known before any weight is read, then the filled model and its report.

Three ways lead to a filled model. The checkpoint is read and the recipe applied; or an artifact that someone made so
before is mapped; or the source is itself compressed already, by us or by another program, and is read as it is.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase

from serve.compression.account import account
from serve.compression.activations import BlockActivations
from serve.compression.artifact import Artifact, Draft, Store
from serve.compression.calibration import Calibration, bundled
from serve.compression.checkpoints import Checkpoint, Weights
from serve.compression.compress import Notes, Progress, Reader, Sink, compress, silent
from serve.compression.fingerprint import facts_of, fingerprint_of
from serve.compression.foreign import ForeignParts, stored_recipe
from serve.compression.memory import PeakMemory, prompt_release, release, watch_peak
from serve.compression.plan import Plan, check_patterns
from serve.compression.recipe import Recipe
from serve.compression.report import LoadReport
from serve.compression.restore import restore
from serve.compression.sensitivity import mix
from serve.compression.sizes import cut_config
from serve.compression.skeleton import DTYPES, Skeleton, build
from serve.compression.source import Source
from serve.compression.stages import Dense, Mixed
from serve.compression.structure import cut
from serve.errors import ArtifactError, CheckpointError, RecipeError, UnsupportedHardware

__all__ = ["Loader", "context_length"]

_log = logging.getLogger(__name__)


class Loader:
    """A source and a recipe, opened. Fill its `skeleton` by one of `through`, `compress`, `import_foreign` or `map`."""

    def __init__(
        self,
        source: str,
        recipe: Recipe,
        device: torch.device,
        calibration: Calibration | None,
        progress: Progress,
        peak: PeakMemory,
        pruned: bool = False,
    ) -> None:
        self.progress, self.peak = progress, peak
        self.seconds: dict[str, float] = {}
        with self.timed("open"):
            self.source = Source.find(source)
            self.foreign: ForeignParts | None = None
            self.recipe = self._as_stored(recipe)
            if not (self.stored or self.recipe.structures or pruned):  # a cut may take layers that a pattern names
                check_patterns(recipe, self.skeleton.projections, dict(self.skeleton.model.named_modules()))
            self.calibration = (calibration or bundled()) if self.recipe.needs_calibration and not self.stored else None
            self.plan = Plan(self.recipe, device, pruned=pruned)
            self.facts = facts_of(self.source, self.recipe, self.calibration) | ({"pruned": True} if pruned else {})
            made_by_us = self.source.artifact
            self.fingerprint = made_by_us.fingerprint if made_by_us else fingerprint_of(self.facts)
            self.tokenizer = _tokenizer(self.source)
        self.report: LoadReport | None = None
        self._calibrated: list[BlockActivations] = []

    @classmethod
    @contextmanager
    def opened(
        cls,
        source: str,
        recipe: Recipe,
        *,
        device: str = "auto",
        calibration: Calibration | None = None,
        progress: Progress = silent,
        pruned: bool = False,
    ) -> Iterator[Loader]:
        """A loader whose memory is watched, and returned to the system, until the block ends.

        `pruned`: the source's zeros are the recipe's pruning, which is not chosen anew.
        """
        with prompt_release(), watch_peak() as peak:
            yield cls(source, recipe, find_device(device), calibration, progress, peak, pruned)
            release()

    @property
    def stored(self) -> bool:
        """Whether the source is compressed already."""
        return self.foreign is not None or self.source.artifact is not None

    @property
    def worth_storing(self) -> bool:
        """Whether an artifact would save anything; a model that is only read, in the type it has, stays where it is."""
        converts = self.source.stored_dtype != DTYPES[self.recipe.dtype]
        return not self.stored and (converts or bool(self.recipe.work) or self.recipe.lm_head != "keep")

    def fill(self, store: Store | None) -> None:
        """Fill the model by whichever way is right for it."""
        if self.source.artifact is not None:
            self.map(self.source.artifact)
        elif self.foreign is not None:
            self.import_foreign(self.foreign)
        elif store is None or not self.worth_storing:
            self.compress(None)
        else:
            self.through(store)

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
            with self.timed("save"):
                store.finish(draft, self.manifest(report))

    def compress(self, sink: Sink | None) -> LoadReport:
        """Read the checkpoint and apply the recipe."""
        with self.timed("compress"):
            weights = self._weights(sink if isinstance(sink, Draft) else None)
            if isinstance(self.recipe.quantizer, Mixed):
                self._use(self._mixed(weights, sink))
            activations = self._activations(self.skeleton) if self.recipe.calibrates_layers else None
            compress(self.skeleton, weights, self.plan, activations=activations, sink=sink, progress=self.progress)
        return self._account(
            calibration_tokens=self._calibrated[-1].tokens if self._calibrated else 0,
            activation_bytes=max((text.activation_bytes for text in self._calibrated), default=0),
            hessian_bytes=max((text.hessian_bytes for text in self._calibrated), default=0),
            original_parameters=self._original_parameters(),
            unused_keys=weights.unused_keys,
        )

    def import_foreign(self, foreign: ForeignParts) -> LoadReport:
        """Read what another program compressed."""
        with self.timed("import"):
            restore(self.skeleton, self.plan, foreign.reader(self.plan).read)
        return self._account(unused_keys=foreign.weights.unused_keys)

    def map(self, artifact: Artifact) -> LoadReport:
        """Take what we compressed before; raise `ArtifactError` where it is not what it says."""
        self._use(_saved_recipe(artifact))
        reader = _AddressNoting(artifact)
        with self.timed("map"):
            restore(self.skeleton, self.plan, reader.read)
        saved = LoadReport.from_dict(artifact.manifest["report"])
        return self._account(
            mapped=frozenset(reader.addresses),
            artifact_hit=True,
            calibration_tokens=saved.calibration_tokens,
            original_parameters=saved.original_parameters,
            quality=artifact.manifest.get("quality"),
            unused_keys=saved.unused_keys,
        )

    def manifest(self, report: LoadReport) -> dict[str, Any]:
        resolved = {"recipe": self.recipe.to_dict()}  # with the choices that `mixed` made
        return {**self.facts, **resolved, "recipe_name": self.recipe.name, "report": report.to_dict()}

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[stage] = time.perf_counter() - start

    def _as_stored(self, asked: Recipe) -> Recipe:
        """The recipe in force: that of the source, where it is compressed already. Builds the empty model for it."""
        artifact = self.source.artifact
        if artifact is not None:
            recipe = _saved_recipe(artifact)
            if asked.work and asked.name != recipe.name:
                raise RecipeError(
                    f"recipe {asked.name}: {self.source.folder} already holds {recipe.name}; ask for that"
                )
        elif self.source.quantization is not None:
            checkpoint = Checkpoint.open(self.source)
            recipe = stored_recipe(self.source.quantization, checkpoint, asked)
            self.skeleton = build(self.source.config, DTYPES[recipe.dtype])
            self.foreign = ForeignParts(self.skeleton, checkpoint, self.source.quantization)
            return replace(recipe, skip=self.foreign.dense)
        else:
            recipe = asked
        self.skeleton = self._build(recipe)
        return recipe

    def _build(self, recipe: Recipe) -> Skeleton:
        """The empty model, of the size that the recipe cuts it to."""
        config = self.source.config
        for stage in recipe.structures:
            config = cut_config(config, stage)
        return build(config, DTYPES[recipe.dtype])

    def _original_parameters(self) -> int:
        """Before any cut; 0 where nothing was cut."""
        if not self.recipe.structures:
            return 0
        return sum(p.numel() for p in build(self.source.config, DTYPES[self.recipe.dtype]).model.parameters())

    def _weights(self, notes: Notes | None) -> Reader:
        """The checkpoint as the empty model names its tensors; cut first, where the recipe says so."""
        checkpoint, config = Checkpoint.open(self.source), self.source.config
        if not self.recipe.structures:
            return Weights(checkpoint, self.skeleton.model)
        whole = build(config, DTYPES[self.recipe.dtype])
        weights: Reader = Weights(checkpoint, whole.model)
        for stage in self.recipe.structures:
            smaller = cut_config(config, stage)
            weights = cut(whole, weights, smaller, self._activations(whole), self.progress, notes)
            config, whole = smaller, build(smaller, DTYPES[self.recipe.dtype])
        return weights

    def _use(self, recipe: Recipe) -> None:
        if recipe != self.recipe:
            self.recipe, self.plan = recipe, Plan(recipe, self.plan.device, pruned=self.plan.pruned)

    def _mixed(self, weights: Reader, sink: Sink | None) -> Recipe:
        """The recipe with a precision for every projection. Needs the whole model, dense and as precise as the file has
        it, for a while.

        An attempt that goes on from finished layers keeps the choices those were made by.
        """
        draft = sink if isinstance(sink, Draft) else None
        if draft is not None and (decided := draft.recall("recipe")) is not None:
            return Recipe.from_dict(decided)
        exact = "fp32" if self.source.stored_dtype in (torch.float32, None) else self.recipe.dtype
        plain = Recipe(stages=(Dense(exact), *self.recipe.structures))  # type: ignore[arg-type]
        dense, plain = self._build(plain), Recipe(stages=plain.stages[:1])
        compress(dense, weights, Plan(plain, self.plan.device), mapped=True)
        assert self.calibration is not None
        text = self.samples(self.calibration)
        mixed = mix(self.recipe, dense, text, self.plan.device, progress=self.progress, notes=draft)
        if draft is not None:
            draft.remember("recipe", mixed.to_dict())
        return mixed

    def samples(self, calibration: Calibration) -> list[list[int]]:
        """The text's token ids as this model reads it."""
        context_tokens = context_length(self.source.config, self.tokenizer)
        return calibration.samples(lambda text: list(self.tokenizer(text)["input_ids"]), context_tokens)

    def _activations(self, skeleton: Skeleton) -> BlockActivations:
        """The calibration text in front of the first block."""
        assert self.calibration is not None
        activations = BlockActivations(skeleton, self.samples(self.calibration), self.plan.device)
        self._calibrated.append(activations)
        return activations

    def _hit(self, store: Store) -> bool:
        """Map from the store; what turns out to be damaged is thrown away and the model built anew."""
        try:
            self.map(store.open(self.fingerprint))
        except ArtifactError as error:
            _log.warning("%s; making it anew", error)
            store.discard(self.fingerprint)
            self.skeleton = self._build(self.recipe)
            return False
        return True

    def _account(self, **facts: Any) -> LoadReport:
        self.report = account(self.skeleton, self.plan, self.seconds, self.peak.peak_bytes, **facts)
        return self.report


@dataclass
class _AddressNoting:
    """Reads an artifact and remembers where its tensors lie, to tell mapped memory from the process's own."""

    artifact: Artifact
    addresses: set[int] = field(default_factory=set)

    def read(self, part: str) -> Mapping[str, Tensor]:
        tensors = self.artifact.read(part)
        self.addresses |= {tensor.data_ptr() for tensor in tensors.values() if tensor.numel()}
        return tensors


def _saved_recipe(artifact: Artifact) -> Recipe:
    try:
        return Recipe.from_dict(artifact.manifest["recipe"])
    except (RecipeError, KeyError, TypeError) as error:
        raise ArtifactError(f"{artifact.folder}: its recipe cannot be read ({error})") from error


def find_device(name: str) -> torch.device:
    """`auto` is the first CUDA device, else the CPU."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise UnsupportedHardware(f"device {name}: no CUDA device here; use cpu or auto")
    return torch.device(name)


def context_length(config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase) -> int:
    """The most tokens that a sequence may have."""
    text = config.get_text_config(decoder=True)
    for name in ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length"):
        if isinstance(length := getattr(text, name, None), int):
            return length
    return int(tokenizer.model_max_length) if tokenizer.model_max_length < 1 << 24 else 2048


def _tokenizer(source: Source) -> PreTrainedTokenizerBase:
    folder = source.folder
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except (ValueError, OSError, KeyError, TypeError, ImportError, AttributeError) as error:
        reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
        raise CheckpointError(f"{folder}: its tokenizer cannot be loaded ({reason})") from error
    assert isinstance(tokenizer, PreTrainedTokenizerBase)
    return tokenizer
