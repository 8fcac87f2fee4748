"""Source and recipe in, a folder or a file out: what `halftone compress` does.

A folder of ours is a model like any other: `halftone serve` and `load` take it as a source. Other formats are for other
programs. Knows nothing about requests, Ray or HTTP.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from glob import escape
from importlib.util import find_spec
from pathlib import Path
from typing import Literal, get_args

from torch import Tensor

from serve.compression.artifact import Draft
from serve.compression.calibration import Calibration
from serve.compression.compress import Progress, silent
from serve.compression.export.gptq import check_gptq, write_gptq
from serve.compression.loader import Loader
from serve.compression.recipe import Recipe
from serve.compression.report import LoadReport
from serve.compression.restore import REST
from serve.errors import ArtifactError, RecipeError, SetupError

__all__ = ["Format", "attempt_folder", "compress_to", "copy_companions"]

Format = Literal["halftone", "gptq", "gguf"]
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

    "halftone" keeps every format exactly; "gptq" is a folder that other programs read, for rtn, gptq and awq recipes;
    "gguf" is one file, `out`, for llama.cpp. An interrupted attempt goes on from its finished layers.
    `pruned`: what the recipe would prune is zero in `source` already, and stays so; nothing is chosen anew.
    """
    if out.exists():
        raise ArtifactError(f"{out}: exists already; choose a new name")
    if format not in get_args(Format):
        raise RecipeError(f"format {format!r} is not one of {', '.join(get_args(Format))}")
    with Loader.opened(
        source, recipe, device=device, calibration=calibration, progress=progress, pruned=pruned
    ) as loader:
        if loader.stored:
            raise RecipeError(f"{source}: compressed already; start from the uncompressed model")
        _check(loader, format)
        draft = Draft(attempt_folder(out, loader.fingerprint), loader.fingerprint)
        report = loader.compress(draft)
        if format == "halftone":
            copy_companions(loader.source.folder, draft.folder)
            draft.finish(out, loader.manifest(report))
        else:
            _export(loader, draft, out, format)
            shutil.rmtree(draft.folder)
    return report


def attempt_folder(out: Path, fingerprint: str, kind: str = "partial") -> Path:
    """Where an attempt is made, and found again by one that would make the same; what another began is removed."""
    aside = out.with_name(f".{kind}-{out.name}-{fingerprint[:8]}")
    for other in out.parent.glob(f".{kind}-{escape(out.name)}-????????"):
        if other != aside:
            shutil.rmtree(other)
    return aside


def _check(loader: Loader, format: Format) -> None:
    """Refuse what the format cannot hold before any work is done."""
    if format == "gptq":
        check_gptq(loader.plan)
    elif format == "gguf":
        if find_spec("gguf") is None:
            raise SetupError("--format gguf needs the package gguf: pip install 'halftone[gguf]'")
        from serve.compression.export.gguf import check_gguf

        check_gguf(loader.skeleton, loader.plan, loader.tokenizer)


def _export(loader: Loader, draft: Draft, out: Path, format: Format) -> None:
    """Written aside, then renamed: `out` is whole once it is there."""
    aside = out.with_name(f".writing-{out.name}")
    if format == "gptq":
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir()
        copy_companions(loader.source.folder, aside)
        write_gptq(aside, loader.skeleton, loader.plan, _parts(loader, draft))
    else:
        from serve.compression.export.gguf import write_gguf

        name = loader.source.folder.name
        write_gguf(aside, name, loader.skeleton, loader.plan, loader.tokenizer, _parts(loader, draft))
    aside.rename(out)


def _parts(loader: Loader, draft: Draft) -> Iterator[tuple[str, dict[str, Tensor]]]:
    for part in (REST, *loader.skeleton.blocks):
        tensors = draft.read(part)
        assert tensors is not None
        yield part, tensors


def copy_companions(source: Path, out: Path) -> None:
    """Configuration, tokenizer, chat template: everything beside the weights."""
    for pattern in _COMPANIONS:
        for path in source.glob(pattern):
            if path.name not in _NOT_COMPANIONS:
                (out / path.name).write_bytes(path.read_bytes())
