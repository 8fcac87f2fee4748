"""The text that a compression method looks at: which file, how much of it, and what it says.

Samples are whole records of a JSONL file (`{"text": ...}`) or the paragraphs of a plain text file, the first
`num_samples` of them, or as many drawn by `seed`. The same facts always give the same samples.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from serve.compression import digests
from serve.errors import CalibrationError

__all__ = ["Calibration", "bundled"]


@dataclass(frozen=True)
class Calibration:
    """`max_tokens` cuts each sample (None: the model's context); `seed` None takes the first samples."""

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
        if not self.file.is_file():
            raise CalibrationError(f"{self.file}: no such calibration file")
        return {**asdict(self), "file": digests.of_file(self.file)}

    def texts(self) -> list[str]:
        """The chosen samples; raise `CalibrationError` naming the line that cannot be read, or if there is none."""
        if not self.file.is_file():
            raise CalibrationError(f"{self.file}: no such calibration file")
        try:
            content = self.file.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise CalibrationError(f"{self.file}: not UTF-8 text (byte {error.start})") from error
        records = _records(self.file, content) if self.file.suffix == ".jsonl" else re.split(r"\n\s*\n", content)
        texts = [text for text in records if text.strip()]
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
