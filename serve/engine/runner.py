"""Computes: one forward pass of a transformers causal language model over a step's tokens. Decides nothing."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from serve.engine.backend import Attender, PagedStep, attending
from serve.engine.head import Head
from serve.engine.inputs import StepInputs
from serve.engine.kv_cache import KVCache
from serve.engine.ragged import lay_out
from serve.engine.rope import PerSequenceRope

__all__ = ["Runner", "StepOutputs"]


@dataclass(frozen=True, slots=True)
class StepOutputs:
    """What a step computed of the rows that were asked for."""

    logits: Tensor  # [R, vocab] in fp32
    hidden: Tensor | None  # [K, hidden], as the head reads them; None where the model does not show them
    best: list[int] | None = None
    """[R], each row's argmax, -1 where its logits are not finite; None: nobody has looked yet."""


class Runner:
    """A model whose attention was pointed at ours, with the KV cache that it reads and writes."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.device = next(model.parameters()).device
        self._rope = PerSequenceRope(model)
        self.rope_switch_tokens = self._rope.switch_tokens
        self.rope_is_static = self._rope.is_static
        self.head: Head | None = None
        """Set where what the model shows before its head is all that its logits are made of."""
        self._states: Tensor | None = None
        _watch_states(model, self._take_states)
        self._takes_rows = "logits_to_keep" in inspect.signature(model.forward).parameters

    def run(self, inputs: StepInputs, cache: KVCache) -> StepOutputs:
        """What is needed of the step's rows. Their keys and values are in the cache afterwards."""
        row = lay_out(inputs, cache.block_size, self.device)
        with attending(PagedStep(cache, row.slots, row.groups)), self._rope.lengths(row.rope_lengths):
            logits = self.forward(row.token_ids, row.positions, row.logit_rows)
        states, self._states = self._states, None
        return StepOutputs(logits, None if states is None or not inputs.keeping else states[0, inputs.hidden_rows])

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
        self.logits_dtype = logits.dtype
        return logits.float()  # type: ignore[no-any-return]

    def _take_states(self, states: Tensor) -> None:
        self._states = states


def _watch_states(model: nn.Module, take: Callable[[Tensor], None]) -> None:
    """Show `take` what the model's body hands to its head, `[1, N, hidden]`, at each forward pass."""
    body = getattr(model, "base_model", model)
    if body is model:
        return

    def hook(_: nn.Module, __: Any, output: Any) -> None:
        states = getattr(output, "last_hidden_state", None)
        if isinstance(states, Tensor):
            take(states)

    body.register_forward_hook(hook)
