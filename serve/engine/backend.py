"""Where transformers' model classes meet our attention.

transformers looks up a model's attention, and the mask it is given, by a name in its configuration. We register one
name for both. The mask that we hand out is no tensor but a `Visibility`, which says in words what a layer may see; it
travels through the model's layers to our attention, so a layer that was given anything else (a mask of the model's own
making, or none) is noticed and refused instead of being served wrong. The K/V cache is not passed through the model at
all: the attention finds the running step through `attending`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Protocol

from serve.engine import lean  # noqa: F401  # isort: skip  first, for it says what transformers leaves out

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import causal_mask_function

from serve.engine.attention import AttentionOptions, QueryGroup, tiled_attention
from serve.engine.kv_cache import KVCache
from serve.errors import UnsupportedArchitecture

__all__ = ["NAME", "Attender", "PagedStep", "Visibility", "attending"]

NAME = "halftone_paged"


@dataclass(frozen=True, slots=True)
class Visibility:
    """Which earlier tokens a layer's queries see: all, or the last `window` with their own."""

    window: int | None = None


class Attender(Protocol):
    """Whatever stands behind the attention of one forward pass."""

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, options: AttentionOptions) -> Tensor:
        """query: [H, N, D]; key, value: [K, N, D] of the new tokens. Returns [N, H, D]."""
        ...


_ATTENDER: ContextVar[Attender] = ContextVar("halftone_attender")


@contextmanager
def attending(attender: Attender) -> Iterator[None]:
    """Every attention call of this thread inside the block goes to `attender`."""
    token = _ATTENDER.set(attender)
    try:
        yield
    finally:
        _ATTENDER.reset(token)


class PagedStep:
    """One step's attention: new keys and values go to their slots, then each group attends over its blocks."""

    def __init__(self, cache: KVCache, slots: Tensor, groups: list[QueryGroup]) -> None:
        self._cache = cache
        self._slots = slots  # [N]
        self._groups = groups

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, options: AttentionOptions) -> Tensor:
        self._cache.write(layer, self._slots, key, value)
        keys, values = self._cache.keys[layer], self._cache.values[layer]
        mixed = query.new_empty(query.shape[1], query.shape[0], value.shape[-1])
        for group in self._groups:
            rows = slice(group.start, group.stop)
            mixed[rows] = tiled_attention(query[:, rows], keys, values, group, options)
        return mixed


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: object,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: object,
) -> tuple[Tensor, None]:
    """The registered function. query, key, value: [1, heads, N, size]; returns [1, N, H, size] and no weights."""
    layer = getattr(module, "layer_idx", None)
    name = type(module).__name__
    if not isinstance(layer, int):
        raise UnsupportedArchitecture(f"{name} does not say which layer it is (layer_idx), so it has no KV cache")
    if not isinstance(attention_mask, Visibility):
        raise UnsupportedArchitecture(f"{name} makes its own attention mask; only causal and sliding ones are served")
    options = AttentionOptions(
        scaling=query.shape[-1] ** -0.5 if scaling is None else float(scaling),
        window=attention_mask.window,
        softcap=softcap,
        sinks=s_aux,
    )
    return _ATTENDER.get().attend(layer, query[0], key[0], value[0], options).unsqueeze(0), None


def _mask(
    *, mask_function: Callable[..., Any], local_size: int | None = None, use_vmap: bool = False, **_: object
) -> Visibility:
    """The registered mask. transformers passes the rule as a function of positions: it is tried, not trusted."""
    visibility = Visibility(local_size)
    if mask_function is causal_mask_function and local_size is None:
        return visibility
    if use_vmap or not _follows(mask_function, visibility):
        raise UnsupportedArchitecture("an attention mask that is neither causal nor a sliding window is not served")
    return visibility


def _follows(mask_function: Callable[..., Any], visibility: Visibility) -> bool:
    """Whether the rule allows just what `visibility` says, on pairs around every border it could have."""
    window = visibility.window or 4
    keys = torch.tensor([0, 1, window - 1, window, window + 1, 2 * window - 1, 2 * window, 2 * window + 1])
    queries = keys[:, None]
    zero = torch.tensor(0)
    expected = keys <= queries
    if visibility.window is not None:
        expected &= keys > queries - visibility.window
    return bool((torch.as_tensor(mask_function(zero, zero, queries, keys)) == expected).all())


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, _mask)
