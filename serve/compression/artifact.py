"""The artifact store: what a recipe made of a model, kept under the fingerprint of everything that decided it.

    STORE/FINGERPRINT/manifest.json           recipe, calibration, source, report, and every part's digest
    STORE/FINGERPRINT/rest.safetensors        one file per part: each block, and the rest
    STORE/.partial-FINGERPRINT/...            the same while it is being made; a rename turns it into the artifact
    STORE/FINGERPRINT.lock                    held by whoever is making it

A part is written aside, synced and renamed, so a process may be killed at any moment: what is there is whole, and the
next attempt goes on from the finished parts. Digests are checked before anything is used; what does not match is made
anew or refused, never served. Tensors are memory-mapped.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from serve.errors import ArtifactError

__all__ = ["MANIFEST", "Artifact", "Draft", "Store", "default_root"]

MANIFEST = "manifest.json"
FORMAT_VERSION = 1
_PARTIAL = ".partial-"
_DECIDED = ".decided.json"


def default_root() -> Path:
    """`HALFTONE_ARTIFACTS`, or a folder in the user's cache."""
    if chosen := os.environ.get("HALFTONE_ARTIFACTS"):
        return Path(chosen).expanduser()
    cache = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(cache) / "halftone" / "artifacts"


@dataclass(frozen=True)
class Artifact:
    """A finished artifact whose manifest has been read; its parts are checked as they are read."""

    folder: Path
    manifest: dict[str, Any]

    @classmethod
    def open(cls, folder: Path, fingerprint: str | None = None) -> Artifact:
        """Read and check the manifest; raise `ArtifactError` unless it is ours, whole and of that fingerprint."""
        try:
            manifest = json.loads((folder / MANIFEST).read_text())
            version, found, parts = manifest["format_version"], manifest["fingerprint"], manifest["parts"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ArtifactError(f"{folder}: no readable manifest ({type(error).__name__})") from error
        if version != FORMAT_VERSION:
            raise ArtifactError(f"{folder}: written in format {version}, this version reads {FORMAT_VERSION}")
        if fingerprint is not None and found != fingerprint:
            raise ArtifactError(f"{folder}: holds the artifact {found}, not {fingerprint}")
        for part in parts.values():
            if Path(part["file"]).name != part["file"]:
                raise ArtifactError(f"{folder}: part {part['file']!r} leads out of the folder")
        return cls(folder, manifest)

    @property
    def fingerprint(self) -> str:
        return str(self.manifest["fingerprint"])

    @property
    def size_bytes(self) -> int:
        return sum(int(part["bytes"]) for part in self.manifest["parts"].values())

    def read(self, part: str) -> dict[str, Tensor]:
        """The part's tensors, mapped; raise `ArtifactError` where the file is not what was written."""
        if part not in self.manifest["parts"]:
            raise ArtifactError(f"{self.folder}: lacks the part {part}")
        return _read_part(self.folder, self.manifest["parts"][part])

    def note_quality(self, quality: Mapping[str, Any]) -> None:
        """Write what was measured on these very weights into the manifest, whole or not at all."""
        self.manifest["quality"] = dict(quality)
        _write_synced(self.folder / MANIFEST, self.manifest)

    def verify(self) -> None:
        """Check every part's digest; raise `ArtifactError` naming the first that is wrong."""
        for part in self.manifest["parts"].values():
            _check_digest(self.folder, part)


class Draft:
    """An artifact in the making: a sink for the driver. Parts that an earlier attempt finished are found again."""

    def __init__(self, folder: Path, fingerprint: str) -> None:
        self.folder, self.fingerprint = folder, fingerprint
        self._parts: dict[str, dict[str, Any]] = {}
        folder.mkdir(parents=True, exist_ok=True)

    def write(self, part: str, tensors: Mapping[str, Tensor]) -> None:
        """Save a part, whole or not at all."""
        name = f"{part}.safetensors"
        aside = self.folder / f"{name}.aside"
        _save(tensors, aside)
        aside.replace(self.folder / name)
        entry = {"file": name, "sha256": _digest(self.folder / name), "bytes": (self.folder / name).stat().st_size}
        _write_synced(self.folder / f"{name}.json", entry)
        self._parts[part] = entry

    def read(self, part: str) -> dict[str, Tensor] | None:
        """A part that was finished before, or None."""
        note = self.folder / f"{part}.safetensors.json"
        try:
            entry = json.loads(note.read_text())
            tensors = _read_part(self.folder, entry)
        except (OSError, ValueError, ArtifactError):
            return None
        self._parts[part] = entry
        return tensors

    def remember(self, name: str, facts: Mapping[str, Any]) -> None:
        """Keep what was decided before any part was made, for whoever goes on from here."""
        _write_synced(self._note(name), facts)

    def recall(self, name: str) -> dict[str, Any] | None:
        """What an earlier attempt decided, or None."""
        try:
            facts = json.loads(self._note(name).read_text())
        except (OSError, ValueError):
            return None
        return facts if isinstance(facts, dict) else None

    def finish(self, target: Path, facts: Mapping[str, Any]) -> Artifact:
        """Write the manifest and move everything to its final place in one step."""
        manifest = {
            "format_version": FORMAT_VERSION, "fingerprint": self.fingerprint, **facts, "parts": self._parts,
        }  # fmt: skip
        _write_synced(self.folder / MANIFEST, manifest)
        for part in self._parts.values():
            (self.folder / f"{part['file']}.json").unlink(missing_ok=True)
        for note in self.folder.glob(f"*{_DECIDED}"):
            note.unlink()
        if target.exists():
            shutil.rmtree(target)
        self.folder.rename(target)
        _sync_folder(target.parent)
        return Artifact(target, manifest)

    def _note(self, name: str) -> Path:
        return self.folder / f"{name}{_DECIDED}"


@dataclass(frozen=True)
class Store:
    """A folder of artifacts. Safe for any number of processes on one machine."""

    root: Path

    def open(self, fingerprint: str) -> Artifact:
        """Raise `ArtifactError` where there is none, or it is not what its name says."""
        return Artifact.open(self._folder(fingerprint), fingerprint)

    def holds(self, fingerprint: str) -> bool:
        return self._folder(fingerprint).is_dir()

    def discard(self, fingerprint: str) -> None:
        shutil.rmtree(self._folder(fingerprint), ignore_errors=True)

    def draft(self, fingerprint: str) -> Draft:
        """Begin, or go on with, an artifact. Hold `locked` meanwhile."""
        return Draft(self.root / f"{_PARTIAL}{fingerprint}", fingerprint)

    def finish(self, draft: Draft, facts: Mapping[str, Any]) -> Artifact:
        return draft.finish(self._folder(draft.fingerprint), facts)

    @contextmanager
    def locked(self, fingerprint: str) -> Iterator[None]:
        """Wait until nobody else is making this artifact; the lock ends with the process, however it ends."""
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            handle = (self.root / f"{fingerprint}.lock").open("w")
        except OSError as error:
            raise ArtifactError(f"{self.root}: the artifact store cannot be written ({error.strerror})") from error
        with handle:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield

    def artifacts(self) -> list[Artifact]:
        """Every artifact with a readable manifest, by name."""
        found = []
        for folder in sorted(self.root.glob("*/")) if self.root.is_dir() else []:
            if not folder.name.startswith(_PARTIAL) and (folder / MANIFEST).is_file():
                found.append(Artifact.open(folder))
        return found

    def prune(self, keep: frozenset[str] = frozenset()) -> list[str]:
        """Remove all artifacts but those kept, and the leavings of attempts that nobody is at; return their names."""
        removed = []
        for folder in sorted(self.root.glob("*/")) if self.root.is_dir() else []:
            fingerprint = folder.name.removeprefix(_PARTIAL)
            if fingerprint not in keep and self._is_free(fingerprint):
                shutil.rmtree(folder)
                removed.append(folder.name)
        return removed

    def _is_free(self, fingerprint: str) -> bool:
        with (self.root / f"{fingerprint}.lock").open("w") as handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
            return True

    def _folder(self, fingerprint: str) -> Path:
        return self.root / fingerprint


def _save(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Tensors that share memory are written once each; readers tie them again by the configuration."""
    plain = {name: tensor.detach().to("cpu").contiguous() for name, tensor in tensors.items()}
    try:
        save_file({name: t.clone() if _shares(t, plain, name) else t for name, t in plain.items()}, path)
        _sync_file(path)
    except (SafetensorError, OSError) as error:
        raise ArtifactError(f"{path.parent}: the artifact cannot be written ({error})") from error


def _shares(tensor: Tensor, others: Mapping[str, Tensor], name: str) -> bool:
    return any(other.data_ptr() == tensor.data_ptr() and key < name for key, other in others.items() if tensor.numel())


def _read_part(folder: Path, entry: Mapping[str, Any]) -> dict[str, Tensor]:
    _check_digest(folder, entry)
    try:
        with safe_open(folder / entry["file"], framework="pt", device="cpu") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ArtifactError(f"{folder / entry['file']}: cannot be read ({error})") from error


def _check_digest(folder: Path, entry: Mapping[str, Any]) -> None:
    path = folder / entry["file"]
    try:
        digest = _digest(path)
    except OSError as error:
        raise ArtifactError(f"{path}: missing or unreadable ({error.strerror})") from error
    if digest != entry["sha256"]:
        raise ArtifactError(f"{path}: its digest is not the manifest's; the file was damaged or replaced")


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write_synced(path: Path, data: Mapping[str, Any]) -> None:
    aside = path.with_name(path.name + ".aside")
    aside.write_text(json.dumps(data, indent=1, sort_keys=True))
    _sync_file(aside)
    aside.replace(path)


def _sync_file(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
