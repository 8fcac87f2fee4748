"""Source and recipe in, a folder out: what `halftone compress` does.

The folder is a model like any other: `halftone serve` and `load` take it as a source. Knows nothing about requests, Ray
or HTTP.
"""

from __future__ import annotations

import shutil
from glob import escape
from pathlib import Path
from typing import Literal

from serve.compression.artifact import Draft
from serve.compression.calibration import Calibration
from serve.compression.compress import Progress, silent
from serve.compression.export import GptqExport
from serve.compression.loader import Loader
from serve.compression.recipe import Recipe
from serve.compression.report import LoadReport
from serve.errors import ArtifactError, RecipeError

__all__ = ["attempt_folder", "compress_to", "copy_companions"]

Format = Literal["halftone", "gptq"]
_COMPANIONS = ("*.json", "*.model", "*.txt", "*.jinja")
_NOT_COMPANIONS = ("model.safetensors.index.json", "quantize_config.json")


def compress_to(
    source: str,
    recipe: Recipe,
    out: Path,
    *,
    format: Format = "halftone",
    calibration: Calibration | None = None,
    device: str = "auto",
    progress: Progress = silent,
    pruned: bool = False,
) -> LoadReport:
    """Compress `source` into the new folder `out`, whole or not at all; raise a `SetupError` of one line otherwise.

    "halftone" keeps every format exactly; "gptq" is what other programs read, for rtn, gptq and awq recipes.
    `pruned`: what the recipe would prune is zero in `source` already, and stays so; nothing is chosen anew.
    """
    if out.exists():
        raise ArtifactError(f"{out}: exists already; choose a new folder")
    if format not in ("halftone", "gptq"):
        raise RecipeError(f"format {format!r} is not one of halftone, gptq")
    with Loader.opened(
        source, recipe, device=device, calibration=calibration, progress=progress, pruned=pruned
    ) as loader:
        aside = attempt_folder(out, loader.fingerprint)
        if loader.stored:
            raise RecipeError(f"{source}: compressed already; start from the uncompressed model")
        if format == "gptq":
            shutil.rmtree(aside, ignore_errors=True)
            config = loader.source.config.to_dict()
            export = GptqExport(aside, loader.skeleton, loader.plan)
            report = loader.compress(export)
            copy_companions(loader.source.folder, aside)
            export.finish(config)
            aside.rename(out)
        else:
            draft = Draft(aside, loader.fingerprint)
            report = loader.compress(draft)
            copy_companions(loader.source.folder, aside)
            draft.finish(out, loader.manifest(report))
    return report


def attempt_folder(out: Path, fingerprint: str, kind: str = "partial") -> Path:
    """Where an attempt is made, and found again by one that would make the same; what another began is removed."""
    aside = out.with_name(f".{kind}-{out.name}-{fingerprint[:8]}")
    for other in out.parent.glob(f".{kind}-{escape(out.name)}-????????"):
        if other != aside:
            shutil.rmtree(other)
    return aside


def copy_companions(source: Path, out: Path) -> None:
    """Configuration, tokenizer, chat template: everything beside the weights."""
    for pattern in _COMPANIONS:
        for path in source.glob(pattern):
            if path.name not in _NOT_COMPANIONS:
                (out / path.name).write_bytes(path.read_bytes())
