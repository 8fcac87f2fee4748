"""The text that a student learns from, cut into windows and dealt into batches.

Every epoch is shuffled anew, and windows of like length go together, so that little is padding. Which windows a step
gets follows from the seed and the step alone: whoever goes on from step n meets what an uninterrupted run would have.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from serve.distillation.objective import IGNORED
from serve.errors import CalibrationError

__all__ = ["Batch", "Windows", "cut"]

_POOL_BATCHES = 16


@dataclass(frozen=True)
class Batch:
    """`inputs`, `targets` int64 `[windows, tokens]`; `kept` bool of the same shape, False where there is padding."""

    inputs: Tensor
    targets: Tensor
    kept: Tensor

    @classmethod
    def of(cls, windows: Sequence[Sequence[int]]) -> Batch:
        length = max(map(len, windows))
        inputs = torch.zeros(len(windows), length, dtype=torch.int64)
        targets = torch.full_like(inputs, IGNORED)
        for row, ids in enumerate(windows):
            inputs[row, : len(ids)] = torch.tensor(ids)
            targets[row, : len(ids) - 1] = torch.tensor(ids[1:])
        lengths = torch.tensor([len(ids) for ids in windows])
        return cls(inputs, targets, torch.arange(length)[None] < lengths[:, None])


class Windows:
    """Token ids, `batch_size` windows a step."""

    def __init__(self, windows: Sequence[Sequence[int]], batch_size: int, seed: int) -> None:
        if not windows:
            raise CalibrationError("distillation: the text holds no two tokens to learn from")
        self._windows, self._seed = windows, seed
        self._batch_size = min(batch_size, len(windows))
        self._epoch: tuple[int, list[list[int]]] = (-1, [])

    def __len__(self) -> int:
        return len(self._windows)

    def batch(self, step: int) -> list[Sequence[int]]:
        """The windows of this step; what does not fill a batch sits out the epoch."""
        epoch, place = divmod(step, len(self._windows) // self._batch_size)
        if self._epoch[0] != epoch:
            self._epoch = (epoch, self._deal(random.Random(f"{self._seed} {epoch}")))  # noqa: S311
        return [self._windows[index] for index in self._epoch[1][place]]

    def _deal(self, generator: random.Random) -> list[list[int]]:
        order = list(range(len(self._windows)))
        generator.shuffle(order)
        size, batches = self._batch_size, []
        order = order[: len(order) // size * size]
        for start in range(0, len(order), _POOL_BATCHES * size):
            pool = sorted(order[start : start + _POOL_BATCHES * size], key=lambda index: len(self._windows[index]))
            batches += [pool[first : first + size] for first in range(0, len(pool), size)]
        generator.shuffle(batches)
        return batches


def cut(texts: Sequence[Sequence[int]], window_tokens: int) -> list[list[int]]:
    """Texts as windows of at most `window_tokens`, one after another; a last one of a single token is dropped."""
    found = [list(ids[at : at + window_tokens]) for ids in texts for at in range(0, len(ids), window_tokens)]
    return [window for window in found if len(window) > 1]
