"""What distilling a student and pruning it step by step share: a teacher, its text, and a folder of finished steps.

The folder lies beside the result, under the result's name and a digest of everything that decides it. Each student is
saved where it stands before and after its lessons, with what was measured there, so that an interrupted run goes on
from what is finished, and inside a lesson from its last checkpoint.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from serve.compression import digests
from serve.compression.calibration import Calibration, bundled
from serve.compression.compress import Progress, silent
from serve.compression.loader import find_device
from serve.compression.recipe import Recipe
from serve.compression.skeleton import Skeleton
from serve.compression.source import Source
from serve.compression.stages import Dense
from serve.distillation.held_out import Distance, measure
from serve.distillation.sampling import sample_texts
from serve.distillation.settings import Settings
from serve.distillation.student import Origin, make_student, pruned_projections, save_student
from serve.distillation.training import train, zeros_of
from serve.distillation.windows import Windows, cut
from serve.errors import ArtifactError, ConfigError, RecipeError
from serve.loading import LoadedModel, load
from serve.quality import read_texts, tokenize
from serve.saving import attempt_folder

__all__ = ["School", "Text"]

_VERSION = 3  # of the notes in the folder: what an earlier one left is not read
_DENSE = Recipe(stages=(Dense("fp32"),))


@dataclass(frozen=True)
class Text:
    """What is learnt from: the records of `file`, and `sampled` texts by the teacher itself.

    The last `held_out` of them (of the file's, if there is one) are only measured, or the first of `measured`.
    """

    file: Path | None = None
    sampled: int = 0
    held_out: int = 32
    measured: Path | None = None

    def __post_init__(self) -> None:
        if self.file is None and self.sampled <= self.held_out:
            raise ConfigError("sampled", f"without a text the teacher must write more than {self.held_out}")

    def to_dict(self) -> dict[str, Any]:
        """What decides a result: the files' contents, not their names."""
        files = {name: getattr(self, name) for name in ("file", "measured")}
        for path in files.values():
            if path is not None and not path.is_file():
                raise ConfigError("data", f"{path}: no such text file")
        return {
            **{name: None if path is None else digests.of_file(path) for name, path in files.items()},
            "sampled": self.sampled,
            "held_out": self.held_out,
        }


@dataclass
class School:
    """Everything that the students of one teacher have in common. Opening it reads no weights."""

    teacher_source: str
    out: Path
    text: Text
    settings: Settings
    calibration: Calibration | None = None
    device: str = "auto"
    progress: Progress = silent
    decides: dict[str, Any] = field(default_factory=dict)
    """What else decides the result; of plain types."""

    def __post_init__(self) -> None:
        if self.out.exists():
            raise ArtifactError(f"{self.out}: exists already; choose a new folder")
        self.source = Source.find(self.teacher_source)
        if self.source.artifact is not None or self.source.quantization is not None:
            raise RecipeError(f"{self.teacher_source}: compressed already; the teacher must be an ordinary model")
        facts = {
            "version": _VERSION,
            "teacher": digests.of_folder(self.source.folder, self.source.weight_files),
            "text": self.text.to_dict(),
            "settings": self.settings.to_dict(),
            "calibration": (self.calibration or bundled()).to_dict(),
            **self.decides,
        }
        self.fingerprint = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]
        self.folder = attempt_folder(self.out, self.fingerprint, "lessons")
        self.folder.mkdir(parents=True, exist_ok=True)

    @cached_property
    def teacher(self) -> LoadedModel:
        return load(self.teacher_source, _DENSE, device=self.device, progress=self.progress)

    def origin(self, folder: Path | None = None) -> Origin:
        """A finished student as what the next one is made of; None: the teacher."""
        source = self.source if folder is None else Source.find(str(folder))
        return Origin(source, self.teacher.tokenizer, self.calibration or bundled(), find_device(self.device))

    def keep(self, name: str, make: Callable[[], Skeleton]) -> tuple[Path, Distance]:
        """The student `name`, made and measured unless that is done already."""
        folder = self.folder / name
        if not folder.exists():
            save_student(make().model, self.source, folder)
        return folder, self._measured(folder)

    def teach(
        self, start: Path, name: str, pruned: Recipe | None = None, settings: Settings | None = None
    ) -> tuple[Path, Distance]:
        """The student of `start` after its lessons, kept as `name`."""
        folder, checkpoint = self.folder / name, self.folder / f"{name}.pt"
        if not folder.exists():
            student = self.student(start)
            kept = zeros_of(student.model, pruned_projections(student, pruned))
            train(
                student.model, self.teacher.model, self._windows, settings or self.settings,
                kept=kept, checkpoint=checkpoint, progress=self.progress,
            )  # fmt: skip
            save_student(student.model, self.source, folder)
        checkpoint.unlink(missing_ok=True)
        return folder, self._measured(folder)

    def student(self, folder: Path) -> Skeleton:
        """A finished student, in float32."""
        return make_student(self.origin(folder), progress=self.progress)

    def measure(self, folder: Path, recipe: Recipe | None) -> Distance:
        """A finished model's distance from the teacher; None: the folder holds an ordinary checkpoint."""
        found = load(str(folder), recipe or _DENSE, device=self.device, progress=self.progress)
        return measure(self.teacher.model, found.model, self._texts[1], self.progress)

    def _measured(self, folder: Path) -> Distance:
        """What was measured before is written down beside it."""
        note = self.folder / f"{folder.name}.json"
        if note.exists():
            return Distance.from_dict(json.loads(note.read_text()))
        found = measure(self.teacher.model, self.student(folder).model, self._texts[1], self.progress)
        _write(note, found.to_dict())
        return found

    @cached_property
    def _windows(self) -> Windows:
        tokens = min(self.settings.window_tokens, self.teacher.context_length)
        return Windows(cut(self._texts[0], tokens), self.settings.batch_size, self.settings.seed)

    @cached_property
    def _texts(self) -> tuple[list[list[int]], list[list[int]]]:
        """Token ids to learn from, and to measure on."""
        sampled = self._sampled() if self.text.sampled else []
        read = self._read(self.text.file) if self.text.file is not None else []
        if self.text.measured is not None:
            return read + sampled, self._read(self.text.measured)[: self.text.held_out]
        first = read or sampled
        if len(first) <= self.text.held_out:
            raise ConfigError(
                "data", f"holds {len(first)} records, and {self.text.held_out} are held out to measure on"
            )
        learnt, held_out = first[: -self.text.held_out], first[-self.text.held_out :]
        return learnt + (sampled if read else []), held_out

    def _read(self, file: Path) -> list[list[int]]:
        return tokenize(self.teacher.tokenizer, read_texts(file), self.teacher.context_length)

    def _sampled(self) -> list[list[int]]:
        note = self.folder / "sampled.json"
        if not note.exists():
            tokens = min(self.settings.window_tokens, self.teacher.context_length)
            texts = sample_texts(
                self.teacher.model, self.teacher.tokenizer, self.text.sampled, max_tokens=tokens,
                ends=self.teacher.eos_token_ids, seed=self.settings.seed, progress=self.progress,
            )  # fmt: skip
            _write(note, texts)
        found: list[list[int]] = json.loads(note.read_text())
        return found

    @property
    def stored_dtype(self) -> torch.dtype:
        return self.source.stored_dtype or torch.float32


def _write(file: Path, data: Any) -> None:
    aside = file.with_suffix(".aside")
    aside.write_text(json.dumps(data))
    aside.replace(file)
