"""The output head as a function of hidden states, where it is one: found by trial, like the rest of an architecture.

Two variants whose heads are the same bit for bit need not send each other logits: hidden states are some sixty times
smaller, and either side can turn them into the logits that the other one served. Gemma's capped logits, Cohere's scaled
ones and compressed heads are more than a product with a weight; there `tried_head` gives None.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Head", "tried_head"]

_COLUMNS = 4096
"""Output columns whose weights are in float32 at the same time."""


@dataclass(frozen=True)
class Head:
    """A head whose logits are `hidden @ weight.T + bias` and nothing else.

    digest: of the weight, its type and its bias. dtype: of the weight, and of the hidden states that it reads.
    logits_dtype: what served logits were rounded to. project: `[R, hidden]` to float32 `[R, vocab]`, not rounded; on
    the engine's thread only.
    """

    digest: str
    dtype: torch.dtype
    logits_dtype: torch.dtype
    project: Callable[[Tensor], Tensor]


def tried_head(model: Any, hidden: Tensor, logits: Tensor, logits_dtype: torch.dtype) -> Head | None:
    """The model's head, if it makes these logits `[1, vocab]` of that hidden state `[1, hidden]`."""
    module = model.get_output_embeddings()
    weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
    if not isinstance(weight, Tensor) or not weight.is_floating_point() or hidden.shape[-1:] != weight.shape[1:]:
        return None
    project = _Product(module)
    ours = project(hidden).to(logits_dtype).float()
    if ours.shape != logits.shape or not float((ours - logits).norm() / logits.norm()) <= _tolerance(logits_dtype):
        return None
    return Head(_digest(weight, bias), weight.dtype, logits_dtype, project)


class _Product:
    """Exact in float32: products of 16-bit numbers are, and only their sum is rounded."""

    def __init__(self, module: nn.Module) -> None:
        self._module: Any = module

    @torch.inference_mode()
    def __call__(self, hidden: Tensor) -> Tensor:
        weight: Tensor = self._module.weight
        bias: Tensor | None = self._module.bias
        x = hidden.to(weight.device, torch.float32)
        logits = torch.cat([x @ part.float().T for part in torch.split(weight, _COLUMNS)], dim=1)
        return logits if bias is None else logits + bias.float()


def _tolerance(dtype: torch.dtype) -> float:
    return 1e-4 if dtype is torch.float32 else 5e-3


def _digest(weight: Tensor, bias: Tensor | None) -> str:
    digest = blake2b(f"{weight.dtype} {tuple(weight.shape)} {bias is not None}".encode(), digest_size=16)
    for part in (*torch.split(weight.detach(), _COLUMNS), *(() if bias is None else (bias.detach(),))):
        digest.update(part.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
