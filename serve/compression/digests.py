"""Digests of a checkpoint's files, remembered: a model is read whole once, not at every start.

A file's digest is remembered by its path, size and time of change. Files in the Hugging Face cache are named by their
SHA-256 already.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

__all__ = ["of_file", "of_folder"]

_SHA256 = re.compile(r"[0-9a-f]{64}")
_SMALL_FILES = ("config.json", "generation_config.json", "model.safetensors.index.json", "quantize_config.json")


def of_folder(folder: Path, weight_files: Iterable[Path]) -> dict[str, str]:
    """SHA-256 by file name, for the weights and the small files that decide what they mean."""
    small = [folder / name for name in _SMALL_FILES if (folder / name).is_file()]
    return {path.name: of_file(path) for path in sorted([*weight_files, *small])}


def of_file(path: Path) -> str:
    """SHA-256 of the file's bytes."""
    target = path.resolve()
    if _SHA256.fullmatch(target.name):
        return target.name
    status = target.stat()
    key = f"{target}:{status.st_size}:{status.st_mtime_ns}"
    known = _load()
    if key not in known:
        with target.open("rb") as file:
            known = _load() | {key: hashlib.file_digest(file, "sha256").hexdigest()}
        _save(known)
    return known[key]


def _store() -> Path:
    cache = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(cache) / "halftone" / "digests.json"


def _load() -> dict[str, str]:
    try:
        known = json.loads(_store().read_text())
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}


def _save(known: dict[str, str]) -> None:
    """Best effort: where the cache cannot be written, digests are made anew each time."""
    path = _store()
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_suffix(f".{os.getpid()}")
        aside.write_text(json.dumps(known))
        aside.replace(path)
