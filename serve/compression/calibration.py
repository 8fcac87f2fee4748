"""The text that a compression method looks at: which file, how much of it, and what it says.

Samples are whole records of a JSONL file (`{"text": ...}`) or the paragraphs of a plain text file, the first
`num_samples` of them, or as many drawn by `seed`. The same facts always give the same samples.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from serve.compression import digests
from serve.errors import CalibrationError

__all__ = ["Calibration"]


@dataclass(frozen=True)
class Calibration:
    """`max_tokens` cuts each sample (None: the model's context); `seed` None takes the first samples."""

    file: Path
    num_samples: int = 128
    max_tokens: int | None = None
    seed: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """What a fingerprint covers: the file's contents count, not its name."""
        if not self.file.is_file():
            raise CalibrationError(f"{self.file}: no such calibration file")
        return {**asdict(self), "file": digests.of_file(self.file)}
