"""Computes: one forward pass of a transformers causal language model over a step's tokens. Decides nothing."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from serve.engine.backend import Attender, PagedStep, attending
from serve.engine.inputs import StepInputs
from serve.engine.kv_cache import KVCache
from serve.engine.rope import PerSequenceRope

__all__ = ["Runner"]


class Runner:
    """A model whose attention was pointed at ours, with the KV cache that it reads and writes."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.device = next(model.parameters()).device
        self._rope = PerSequenceRope(model)
        self.rope_switch_tokens = self._rope.switch_tokens
        self.rope_is_static = self._rope.is_static
        self._takes_rows = "logits_to_keep" in inspect.signature(model.forward).parameters

    def run(self, inputs: StepInputs, cache: KVCache) -> Tensor:
        """Logits of the needed rows, [R, vocab] in fp32. The step's keys and values are in the cache afterwards."""
        with attending(PagedStep(cache, inputs.slots, inputs.groups)), self._rope.lengths(inputs.rope_lengths):
            return self.forward(inputs.token_ids, inputs.positions, inputs.logit_rows)

    def describe(self, attender: Attender, num_tokens: int = 4) -> None:
        """Show `attender` one forward pass over a few tokens."""
        row = torch.arange(num_tokens, device=self.device)
        with attending(attender):
            self.forward(row[None], row[None], row[-1:])

    @torch.inference_mode()
    def forward(self, token_ids: Tensor, positions: Tensor, logit_rows: Tensor) -> Tensor:
        """token_ids, positions: [1, N]; logit_rows: [R]. Returns [R, vocab] in fp32."""
        arguments: dict[str, Any] = {"logits_to_keep": logit_rows} if self._takes_rows else {}
        output = self.model(
            input_ids=token_ids,
            # Without one, transformers would look for sequences packed into the row, and mask them in its own way.
            attention_mask=torch.ones_like(token_ids),
            position_ids=positions,
            use_cache=False,
            **arguments,
        )
        logits = output.logits[0] if self._takes_rows else output.logits[0, logit_rows]
        return logits.float()  # type: ignore[no-any-return]
