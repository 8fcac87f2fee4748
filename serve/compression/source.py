"""Where a model comes from: a local folder, `builtin:storyteller` or a Hub id; its configuration and its files.

Only safetensors are accepted, and nothing that a checkpoint brings along is executed. Opens no weights.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PretrainedConfig

from serve.compression.artifact import MANIFEST, Artifact
from serve.errors import CheckpointError

__all__ = ["Source", "find_source", "indexed_names"]

_BUILTIN = "builtin:"
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_HUB_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
_REFUSED = (".bin", ".pt", ".pth", ".ckpt", ".gguf")
_OFFLINE = "offline, use a local folder, a model already in the Hugging Face cache, or builtin:storyteller"


def find_source(source: str) -> Path:
    """The folder that holds `source`; downloads a Hub id. Raise `CheckpointError` where there is none."""
    if source.startswith(_BUILTIN):
        return _builtin(source)
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder
    if folder.is_file():
        raise CheckpointError(f"{source}: a file; expected the folder that holds config.json and *.safetensors")
    if source.startswith((".", "/", "~")) or not _HUB_ID.fullmatch(source):
        raise CheckpointError(f"{source}: no such folder")
    return _from_hub(source)


def _builtin(source: str) -> Path:
    if source != "builtin:storyteller":
        raise CheckpointError(f"{source}: unknown built-in model; there is builtin:storyteller")
    return Path(str(import_module("serve.storyteller").PATH))


def _from_hub(source: str) -> Path:
    import httpx
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(source, allow_patterns=_HUB_FILES, ignore_patterns=["*/*"]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, httpx.HTTPError, OSError) as error:
        reason = type(error).__name__
        raise CheckpointError(
            f"{source}: neither a local folder nor to be had from the Hugging Face Hub ({reason}); {_OFFLINE}"
        ) from error


@dataclass(frozen=True)
class Source:
    """A folder that holds a model, with its configuration read and its weight files found but not opened.

    `artifact` is set where Halftone compressed it, `quantization` (the configuration's settings) where others did.
    `stored_dtype` is the configuration's, which building a model changes.
    """

    folder: Path
    config: PretrainedConfig
    stored_dtype: torch.dtype | None
    weight_files: tuple[Path, ...]
    artifact: Artifact | None = None
    quantization: dict[str, Any] | None = None

    @classmethod
    def find(cls, source: str) -> Source:
        """Raise `CheckpointError` where there is no such model, or no configuration or weights of a known form."""
        folder = find_source(source)
        config = _read_config(folder)
        dtype = config.dtype if isinstance(config.dtype, torch.dtype) else getattr(torch, str(config.dtype), None)
        artifact = Artifact.open(folder) if (folder / MANIFEST).is_file() else None
        files = () if artifact is not None else tuple(_weight_files(folder))
        return cls(folder, config, dtype, files, artifact, _take_quantization(config))


def _take_quantization(config: PretrainedConfig) -> dict[str, Any] | None:
    """The settings of whoever compressed the checkpoint, taken out of `config`: the model is built without them."""
    settings = config.__dict__.pop("quantization_config", None)
    if settings is None or isinstance(settings, dict):
        return settings
    found: dict[str, Any] = settings.to_dict()
    return found


def _read_config(folder: Path) -> PretrainedConfig:
    path = folder / "config.json"
    if not path.is_file():
        raise CheckpointError(f"{folder}: no config.json; is this a model folder?")
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except (ValueError, OSError, KeyError, TypeError, AttributeError) as error:
        reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
        if "trust_remote_code" in str(error):
            reason = "it needs code that the checkpoint brings along, which is never run"
        raise CheckpointError(f"{path}: not a configuration that transformers knows ({reason})") from error
    assert isinstance(config, PretrainedConfig)
    return config


def _weight_files(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        names = sorted(set(_read_index(index).values()))
        for name in names:
            if Path(name).name != name:
                raise CheckpointError(f"{index}: file name {name!r} leads out of the folder")
            if not (folder / name).is_file():
                raise CheckpointError(f"{folder}: {name} is missing, though the index names it")
        return [folder / name for name in names]
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    if found := sorted(folder.glob("*.safetensors")):
        return found
    if others := sorted(path.name for path in folder.iterdir() if path.suffix in _REFUSED):
        raise CheckpointError(f"{folder}: holds {others[0]}, but only safetensors are read; convert it first")
    raise CheckpointError(f"{folder}: no *.safetensors file")


def _read_index(index: Path) -> dict[str, str]:
    try:
        mapping = json.loads(index.read_text())["weight_map"]
        return {str(name): str(file) for name, file in mapping.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index}: not a safetensors index ({type(error).__name__})") from error


def indexed_names(folder: Path) -> Iterator[str]:
    """The tensors that the checkpoint's index promises, if it has one."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        yield from _read_index(index)
