"""`halftone distill`: a student cut out of its teacher, and taught by it, as an ordinary checkpoint.

The student begins with the teacher's own weights: the layers, heads and channels that calibration finds to matter most,
refitted to make up for the rest. What that lost, distillation wins back for the most part.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from serve.compression.calibration import Calibration
from serve.compression.compress import Progress, silent
from serve.compression.recipe import Recipe
from serve.compression.sizes import choose_layers, cut_config
from serve.compression.skeleton import Skeleton
from serve.distillation.held_out import Distance
from serve.distillation.school import School, Text
from serve.distillation.settings import Settings
from serve.distillation.student import make_student, save_student
from serve.errors import CheckpointError, RecipeError

__all__ = ["Distilled", "distill"]


@dataclass(frozen=True)
class Distilled:
    """What came of it. `recovered_ratio` is the share of the lost KL that distillation won back."""

    out: str
    student: str
    parameters: int
    teacher_parameters: int
    bytes: int
    before: Distance
    after: Distance
    settings: Settings

    @property
    def recovered_ratio(self) -> float:
        lost = self.before.kl_divergence
        return 1 - self.after.kl_divergence / lost if lost > 0 else 1.0

    def to_dict(self) -> dict[str, Any]:
        return {
            "out": self.out,
            "student": self.student,
            "parameters": self.parameters,
            "teacher_parameters": self.teacher_parameters,
            "parameters_ratio": self.teacher_parameters / self.parameters,
            "bytes": self.bytes,
            "before": self.before.to_dict(),
            "after": self.after.to_dict(),
            "recovered_ratio": self.recovered_ratio,
            "settings": self.settings.to_dict(),
        }


def distill(
    teacher: str,
    out: Path,
    text: Text,
    *,
    student: str = "structured50",
    layers: Sequence[int] | None = None,
    settings: Settings | None = None,
    calibration: Calibration | None = None,
    device: str = "auto",
    progress: Progress = silent,
) -> Distilled:
    """Teach `student` (a structural recipe that cuts the teacher, or a folder with a smaller model) into folder `out`.

    With `layers` the student has those of the teacher's layers, and `student` cuts them further unless it is empty.
    Interrupted, the same call goes on from the last checkpoint. Raise a `SetupError` of one line where it cannot be.
    """
    settings = settings or Settings()
    origin = _student_folder(student)
    recipe = None if origin is not None or not student else _cut_only(student)
    decides = {"student": str(origin) if origin else student, "layers": list(layers or ())}
    school = School(teacher, out, text, settings, calibration, device, progress, decides)

    def make() -> Skeleton:
        whole = school.origin(origin)
        if origin is not None:
            _check_vocabulary(whole.source.config, school.source.config)
        config, sizes = whole.source.config, []
        if layers is not None:
            config = choose_layers(config, layers)
        for stage in recipe.structures if recipe is not None else ():
            config = cut_config(config, stage)
            sizes.append(config)
        return make_student(whole, sizes, layers=layers, progress=progress)

    start, before = school.keep("start", make)
    done, after = school.teach(start, "done")
    model = school.student(done).model
    save_student(model, school.source, out, school.stored_dtype)
    shutil.rmtree(school.folder)
    return Distilled(
        out=str(out),
        student=", ".join(
            filter(None, [f"layers {','.join(map(str, layers))}" if layers is not None else "", student])
        ),
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        teacher_parameters=sum(parameter.numel() for parameter in school.teacher.model.parameters()),
        bytes=sum(file.stat().st_size for file in out.glob("*.safetensors")),
        before=before,
        after=after,
        settings=settings,
    )


def _student_folder(student: str) -> Path | None:
    folder = Path(student).expanduser()
    return folder if student and (folder / "config.json").is_file() else None


def _cut_only(student: str) -> Recipe:
    recipe = Recipe.parse(student)
    if not recipe.structures or len(recipe.structures) != len(recipe.work) or recipe.lm_head != "keep":
        raise RecipeError(
            f"student {student}: expected cuts alone, as structured50 or depth25+structured25, or a model's folder; "
            "compress the student afterwards with any recipe"
        )
    return recipe


def _check_vocabulary(student: Any, teacher: Any) -> None:
    sizes = [config.get_text_config(decoder=True).vocab_size for config in (student, teacher)]
    if sizes[0] != sizes[1]:
        raise CheckpointError(
            f"the student's vocabulary has {sizes[0]} entries and the teacher's {sizes[1]}: they must share a tokenizer"
        )
