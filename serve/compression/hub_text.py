"""Text from a dataset on the Hugging Face Hub: which of its files, and where it lies once it is here.

    hub:OWNER/NAME                the dataset's only readable file
    hub:OWNER/NAME:FILE           one of several
    hub:OWNER/NAME:FILE@REVISION  at a branch, a tag or a commit; `refs/convert/parquet` has every dataset as Parquet

JSONL, plain text and Parquet (which needs pyarrow) are read. What was downloaded once is taken from the cache.
"""

from __future__ import annotations

import re
from pathlib import Path

from serve.errors import CalibrationError

__all__ = ["PREFIX", "locate"]

PREFIX = "hub:"
_SPEC = re.compile(r"hub:(?P<name>[\w.-]+(?:/[\w.-]+)?)(?::(?P<file>[^@]+))?(?:@(?P<revision>.+))?")
_READABLE = (".jsonl", ".txt", ".parquet")
_SHOWN = 6


def locate(spec: str) -> Path:
    """The local file; downloads it first. Raise `CalibrationError` where there is not exactly one."""
    match = _SPEC.fullmatch(spec)
    if match is None:
        raise CalibrationError(f"{spec}: not of the form hub:OWNER/NAME, hub:OWNER/NAME:FILE or ...:FILE@REVISION")
    import httpx
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    name, file, revision = match["name"], match["file"], match["revision"]
    try:
        chosen = file or _only(name, _files(name, revision))
        return Path(hf_hub_download(name, chosen, repo_type="dataset", revision=revision))
    except (
        HfHubHTTPError, HFValidationError, EntryNotFoundError, LocalEntryNotFoundError, httpx.HTTPError, OSError,
    ) as error:  # fmt: skip
        raise CalibrationError(
            f"{spec}: not to be had from the Hugging Face Hub ({type(error).__name__}); "
            "offline, use a local file or a dataset already in the Hugging Face cache"
        ) from error


def _files(name: str, revision: str | None) -> list[str]:
    """The dataset's files as the Hub lists them; offline, those in the cache."""
    import httpx
    from huggingface_hub import HfApi, snapshot_download

    try:
        return list(HfApi().list_repo_files(name, repo_type="dataset", revision=revision))
    except (httpx.HTTPError, OSError):
        folder = Path(snapshot_download(name, repo_type="dataset", revision=revision, local_files_only=True))
        return [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()]


def _only(name: str, files: list[str]) -> str:
    readable = sorted(file for file in files if file.endswith(_READABLE))
    if len(readable) != 1:
        some = ", ".join(readable[:_SHOWN]) + (f" and {len(readable) - _SHOWN} more" if len(readable) > _SHOWN else "")
        told = f"holds several texts; name one as hub:{name}:FILE of {some}" if readable else "holds no readable text"
        raise CalibrationError(f"hub:{name}: {told} (JSONL, text or Parquet)")
    return readable[0]
