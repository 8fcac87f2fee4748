"""Where logits come from: a model at hand, or a file that a reference filled once for many comparisons."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

__all__ = ["LogitSource", "StoredLogits", "model_logits"]

LogitSource = Callable[[Sequence[int]], Tensor]
"""Token ids `[n]` to the logits that follow each of them, float `[n, vocabulary]`; those after the last, which nothing
is there to score by, may be left out."""


def model_logits(model: Any) -> LogitSource:
    """A causal language model as a source; one record is one forward pass, without a cache."""

    @torch.inference_mode()
    def logits(ids: Sequence[int]) -> Tensor:
        batch = torch.tensor([list(ids)], device=model.device)
        found: Tensor = model(batch, use_cache=False).logits[0]
        return found

    return logits


class StoredLogits:
    """A source that asks another once per record and reads its answer from a file ever after.

    The file holds float32 `[tokens, vocabulary]` and is memory-mapped, so that a reference compared with many variants
    takes no memory meanwhile. Records must be asked for with the very ids they were first asked with. With the
    `places` that another process ended up with, its file is read again.
    """

    def __init__(
        self, source: LogitSource, file: Path, places: Mapping[tuple[int, ...], tuple[int, int, int]] | None = None
    ) -> None:
        self._source, self._file = source, file
        self.places = dict(places or {})
        """Token ids -> (offset in bytes, rows, vocabulary)."""

    def __call__(self, ids: Sequence[int]) -> Tensor:
        key = tuple(ids)
        if key not in self.places:
            self._append(key, self._source(ids))
        offset, rows, vocabulary = self.places[key]
        return torch.from_file(
            str(self._file), shared=False, size=(offset + rows * vocabulary * 4) // 4, dtype=torch.float32
        )[offset // 4 :].view(rows, vocabulary)

    def _append(self, key: tuple[int, ...], logits: Tensor) -> None:
        with self._file.open("ab") as file:
            self.places[key] = (file.tell(), logits.shape[0], logits.shape[1])
            file.write(logits.float().cpu().contiguous().numpy().tobytes())
