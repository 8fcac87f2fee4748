"""A checkpoint's weights, one tensor at a time, under the names that the model gives them.

Files are read through memory maps: opening a checkpoint takes no memory and executes nothing. Names and layouts that
transformers has changed since a checkpoint was written (a prefix, experts stacked into one tensor) are translated by
its own tables.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from serve.compression.source import Source, indexed_names
from serve.errors import CheckpointError

__all__ = ["Checkpoint", "Weights"]


@dataclass(frozen=True)
class Checkpoint:
    """An opened source: which file holds which tensor. Reading maps, it does not copy."""

    folder: Path
    files: dict[str, Path]  # tensor name -> file
    _handles: dict[Path, Any] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def open(cls, source: Source) -> Checkpoint:
        """Read every file's header; raise `CheckpointError` on anything that does not add up."""
        handles = {path: _open_file(path) for path in source.weight_files}
        files = {name: path for path, handle in handles.items() for name in handle.keys()}  # noqa: SIM118
        for name in indexed_names(source.folder):
            if name not in files:
                raise CheckpointError(f"{source.folder}: the index names {name}, but no file holds it")
        return cls(source.folder, files, handles)

    def read(self, name: str) -> Tensor:
        """The stored tensor, mapped from its file."""
        path = self.files[name]
        try:
            tensor: Tensor = self._handles[path].get_tensor(name)
        except (SafetensorError, RuntimeError) as error:
            raise CheckpointError(f"{path.name}: tensor {name} cannot be read ({error})") from error
        return tensor


def _open_file(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt", device="cpu")
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path}: truncated or not a safetensors file ({error})") from error


@dataclass
class _Conversion:
    """One of transformers' many-to-one (or one-to-many) layouts: which keys make which parameters."""

    template: WeightConverter
    first: str
    keys: list[tuple[str, str]] = field(default_factory=list)  # (source pattern, key)


class Weights:
    """A checkpoint seen through a model's parameter names. `elsewhere` names modules that are read in another way."""

    def __init__(self, checkpoint: Checkpoint, model: PreTrainedModel, elsewhere: Collection[str] = ()) -> None:
        self.checkpoint, self._elsewhere = checkpoint, frozenset(elsewhere)
        self._model = model
        self._shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
        self._direct: dict[str, str] = {}
        self._converted: dict[str, _Conversion] = {}
        self._results: dict[str, Tensor] = {}
        unused: list[str] = []
        for key, target, converter, pattern in self._renamed():
            if key.rpartition(".")[0] in self._elsewhere:
                continue
            if target not in self._shapes:
                unused.append(key)
            elif converter is None:
                self._direct[target] = key
            else:
                self._add_conversion(key, target, converter, pattern)
        self.unused_keys = tuple(key for key in unused if not _is_ignored(key, model))
        self.tied = self._find_tied()
        self._check()

    def read(self, name: str) -> Tensor:
        """The values of a parameter in the type they are stored in; mapped from the file where no layout changes."""
        name = self.tied.get(name, name)
        tensor, expected = self._read_stored(name), self._shapes[name]
        if tensor.shape != expected:
            found, wanted = list(tensor.shape), list(expected)
            raise CheckpointError(
                f"{self.checkpoint.folder}: {name} has shape {found}, but config.json makes it {wanted}"
            )
        return tensor

    def holds(self, name: str) -> bool:
        name = self.tied.get(name, name)
        return name in self._direct or name in self._converted

    def _renamed(self) -> Iterator[tuple[str, str, WeightConverter | None, str]]:
        mapping = get_model_conversion_mapping(self._model)
        renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
        prefix, shapes = self._model.base_model_prefix, self._shapes
        for key in sorted(self.checkpoint.files, key=dot_natural_key):
            target, pattern = rename_source_key(key, renamings, converters, prefix, shapes)
            if target not in shapes and key in shapes:
                target, pattern = key, None
            yield key, target, by_pattern[pattern] if pattern else None, pattern or ""

    def _add_conversion(self, key: str, first: str, converter: WeightConverter, pattern: str) -> None:
        conversion = self._converted.setdefault(first, _Conversion(converter, first))
        conversion.keys.append((pattern, key))
        for other in converter.target_patterns[1:]:
            self._converted[first.replace(converter.target_patterns[0], other)] = conversion

    def _convert(self, name: str) -> Tensor:
        if name in self._results:
            return self._results.pop(name)
        conversion = self._converted[name]
        worker = deepcopy(conversion.template)
        for pattern, key in conversion.keys:
            read: Any = partial(self.checkpoint.read, key)
            worker.add_tensor(conversion.first, key, pattern, read)
        try:
            made = worker.convert(conversion.first, model=self._model, config=self._model.config)
        except (RuntimeError, ValueError, IndexError) as error:
            raise CheckpointError(f"{self.checkpoint.folder}: {name} cannot be assembled ({error})") from error
        tensors = {key: value[0] if isinstance(value, list) else value for key, value in made.items()}
        if name not in tensors:
            raise CheckpointError(f"{self.checkpoint.folder}: {name} cannot be assembled from {conversion.keys[0][1]}")
        result: Tensor = tensors.pop(name)
        self._results.update(tensors)
        return result

    def _find_tied(self) -> dict[str, str]:
        """Parameter -> the parameter whose values it shares, whichever of the two names the file holds."""
        tied: dict[str, str] = {}
        for target, source in self._model.all_tied_weights_keys.items():
            has_target, has_source = self._has(target), self._has(source)
            if has_target and has_source:
                if torch.equal(self._read_stored(target), self._read_stored(source)):
                    tied[target] = source
            elif has_source:
                tied[target] = source
            elif has_target:
                tied[source] = target
        return tied

    def _has(self, name: str) -> bool:
        return name in self._direct or name in self._converted

    def _read_stored(self, name: str) -> Tensor:
        return self.checkpoint.read(self._direct[name]) if name in self._direct else self._convert(name)

    def _check(self) -> None:
        parameters = {name for name, _ in self._model.named_parameters(remove_duplicate=False)}
        allowed = self._model._keys_to_ignore_on_load_missing or ()
        missing = sorted(
            name
            for name in parameters
            if not self.holds(name)
            and name.rpartition(".")[0] not in self._elsewhere
            and not any(re.search(pattern, name) for pattern in allowed)
        )
        if missing:
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise CheckpointError(
                f"{self.checkpoint.folder}: the weights lack {missing[0]}{more}, which the configuration calls for"
            )


def _is_ignored(key: str, model: PreTrainedModel) -> bool:
    """Tables that old checkpoints stored and the model computes for itself."""
    patterns = [*(model._keys_to_ignore_on_load_unexpected or ()), r"rotary_emb\.inv_freq$", r"\.attn\.(masked_)?bias$"]
    return any(re.search(pattern, key) for pattern in patterns)
