"""The logits that a recipe is served with: by the engine's compiled step where one covers the model, else by the model.

The compiled step keeps float32 between its layers where a plain pass in 16 bits rounds, on the variant's side and on
the reference's. That rounding alone is .0003 to .0005 nats, more than a tenth of what int8 loses: an evaluation that
ran the plain pass would promise other numbers than live drift then measures (docs/DRIFT.md).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from serve.engine.core import EngineCore
from serve.engine.native import is_covered
from serve.engine.settings import EngineSettings
from serve.errors import SetupError
from serve.generation import Failure, GenerationRequest, SamplingParams
from serve.loading import LoadedModel
from serve.quality import LogitSource, model_logits

__all__ = ["served_logits"]


def served_logits(loaded: LoadedModel) -> LogitSource:
    """As the model at hand would be served. Where it is compiled its plain form is gone afterwards."""
    if not is_covered(loaded.model):
        return model_logits(loaded.model)
    settings = EngineSettings(max_num_seqs=1, prefix_cache=False, threads=torch.get_num_threads())
    core = EngineCore(loaded.model, loaded.tokenizer, settings)

    def logits(ids: Sequence[int]) -> Tensor:
        rows = _Rows()
        request = GenerationRequest("scored", tuple(ids), SamplingParams(max_tokens=0))
        events = core.accept(request, time.perf_counter(), rows)
        while not core.is_idle:
            events += core.step()
        for event in events:
            if isinstance(event, Failure):
                raise SetupError(f"{loaded.recipe.name} could not be scored: {event.error.message}")
        return torch.cat(rows.seen)

    return logits


class _Rows:
    """A witness that keeps the logits of every position that predicts a token of the text: all but the last."""

    wants: Literal["prompt_logits"] = "prompt_logits"
    first = 0

    def __init__(self) -> None:
        self.seen: list[Tensor] = []

    def see(self, position: int, rows: Tensor) -> None:
        self.seen.append(rows.clone())
