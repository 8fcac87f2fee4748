"""The text that a compression method looks at: which file, how much of it, and what it says.

Samples are whole records of a JSONL or Parquet file (`{"text": ...}`) or the paragraphs of a plain text file, local or
of a dataset on the Hub (`hub:OWNER/NAME`, see `hub_text`): the first `num_samples` of them, or as many drawn by `seed`.
The same facts always give the same samples.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from serve.compression import digests, hub_text
from serve.errors import CalibrationError

__all__ = ["Calibration", "bundled"]


@dataclass(frozen=True)
class Calibration:
    """`file` is a path, or begins with `hub:`. `max_tokens` cuts each sample (None: the model's context); `seed`
    None takes the first samples.
    """

    file: Path
    num_samples: int = 128
    max_tokens: int | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        for name in ("num_samples", "max_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise CalibrationError(f"calibration: {name} must be at least 1, not {value}")

    def to_dict(self) -> dict[str, Any]:
        """What a fingerprint covers: the file's contents count, not its name."""
        return {**asdict(self), "file": digests.of_file(self.located())}

    def located(self) -> Path:
        """The local file; one of a dataset on the Hub is downloaded first."""
        if str(self.file).startswith(hub_text.PREFIX):
            return hub_text.locate(str(self.file))
        if not self.file.is_file():
            raise CalibrationError(f"{self.file}: no such calibration file")
        return self.file

    def texts(self) -> list[str]:
        """The chosen samples; raise `CalibrationError` naming the line that cannot be read, or if there is none."""
        texts = [text for text in _read(self.located()) if text.strip()]
        if not texts:
            raise CalibrationError(f"{self.file}: holds no text to calibrate on")
        if self.seed is not None:
            random.Random(self.seed).shuffle(texts)  # noqa: S311
        return texts[: self.num_samples]

    def samples(self, tokenize: Callable[[str], list[int]], context_tokens: int) -> list[list[int]]:
        """Token ids of each sample, cut at `max_tokens` and at the model's context."""
        limit = min(self.max_tokens or context_tokens, context_tokens)
        return [ids for text in self.texts() if (ids := tokenize(text)[:limit])]


def bundled() -> Calibration:
    """The stories that come with the embedded model: what is used when no text is named."""
    from serve.storyteller import CALIBRATION

    return Calibration(CALIBRATION)


def _read(file: Path) -> list[str]:
    if file.suffix == ".parquet":
        return _parquet(file)
    try:
        content = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise CalibrationError(f"{file}: not UTF-8 text (byte {error.start})") from error
    return _records(file, content) if file.suffix == ".jsonl" else re.split(r"\n\s*\n", content)


def _parquet(file: Path) -> list[str]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise CalibrationError(f"{file}: Parquet needs pyarrow: pip install 'halftone[datasets]'") from error
    try:
        column = parquet.read_table(file, columns=["text"])["text"].to_pylist()
    except (ArrowException, OSError, KeyError) as error:
        raise CalibrationError(f"{file}: no Parquet file with a column of text ({error})") from error
    return [text for text in column if isinstance(text, str)]


def _records(file: Path, content: str) -> list[str]:
    texts = []
    for number, line in enumerate(content.splitlines(), start=1):
        if line.strip():
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                raise CalibrationError(f"{file}, line {number}: not JSON ({error.msg})") from error
            if not isinstance(record, dict) or not isinstance(record.get("text"), str):
                raise CalibrationError(f'{file}, line {number}: expected {{"text": "..."}}')
            texts.append(record["text"])
    return texts
