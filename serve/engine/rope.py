"""Rotary embeddings that look at the longest position, applied to each sequence for itself.

Dynamic NTK scaling and LongRoPE (arXiv 2402.13753) choose their frequencies by the context's length. transformers
takes the longest position of the whole batch for it, and keeps what an earlier batch grew: right for one sequence,
wrong for a batch of strangers. `PerSequenceRope` calls the module once per distinct length, each time from its initial
state, so that a token's embedding depends on its own sequence only.

LongRoPE has two sets of frequencies, and keys embedded with one mean nothing to queries embedded with the other: where
a text grows past `switch_tokens`, all of it is computed again (transformers' Phi-3 drops its cache there).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["PerSequenceRope", "length_dependent_modules"]


def length_dependent_modules(model: nn.Module) -> list[nn.Module]:
    """The rotary modules of a model whose frequencies depend on the context's length."""
    return [module for module in model.modules() if any(_depends(kind) for kind in _rope_types(module))]


class PerSequenceRope:
    """Wraps the length-dependent rotary modules of a model; without any it does nothing."""

    def __init__(self, model: nn.Module) -> None:
        self._modules = length_dependent_modules(model)
        self._lengths: Tensor | None = None
        longs = [_threshold(module) for module in self._modules if "longrope" in _rope_types(module)]
        self.switch_tokens = min(longs, default=None)
        """The longest text with the short frequencies; None where there is nothing to switch."""
        self.is_static = not self._modules
        """Whether a token is embedded alike however long its text is, so that equal beginnings have equal keys."""
        for module in self._modules:
            module.forward = self._per_length(module, module.forward)

    @contextmanager
    def lengths(self, lengths: list[int]) -> Iterator[None]:
        """lengths: [N], for each token of the next forward pass the context length that it is embedded for."""
        self._lengths = torch.tensor(lengths) if self._modules else None
        try:
            yield
        finally:
            self._lengths = None

    def _per_length(self, module: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
        initial = _state(module)
        threshold = _threshold(module)
        # LongRoPE has but two regimes; dynamic scaling has another for every length.
        longest = None if any("dynamic" in kind for kind in _rope_types(module)) else threshold + 1

        def embed(x: Tensor, position_ids: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor]:
            if self._lengths is None:
                return forward(x, position_ids, **kwargs)  # type: ignore[no-any-return]
            # Lengths up to the threshold all mean the unscaled frequencies.
            lengths = self._lengths.clamp(min=threshold, max=longest)
            cos, sin = None, None
            for length in sorted(set(lengths.tolist())):
                rows = (lengths == length).nonzero()[:, 0].to(position_ids.device)
                _restore(module, initial)
                # The module takes the length from the largest position that it sees: show it one more, and drop it.
                last = position_ids.new_full((1, 1), length - 1)
                part = forward(x, torch.cat([position_ids[:, rows], last], 1), **kwargs)
                if cos is None or sin is None:
                    cos, sin = (p.new_empty(1, position_ids.shape[1], p.shape[-1]) for p in part)
                cos[:, rows], sin[:, rows] = part[0][:, :-1], part[1][:, :-1]
            assert cos is not None, "a forward pass without tokens"
            assert sin is not None, "a forward pass without tokens"
            return cos, sin

        return embed


def _rope_types(module: nn.Module) -> list[str]:
    kind = getattr(module, "rope_type", None)
    if isinstance(kind, dict):
        return [str(value) for value in kind.values()]
    return [kind] if isinstance(kind, str) else []


def _depends(kind: str) -> bool:
    return "dynamic" in kind or kind == "longrope"


def _threshold(module: nn.Module) -> int:
    """The length up to which the frequencies are the unscaled ones."""
    config: Any = module.config
    parameters = getattr(config, "rope_parameters", None) or {}
    nested = [value for value in parameters.values() if isinstance(value, dict)] or [parameters]
    originals = [value.get("original_max_position_embeddings") for value in nested]
    return min([int(o) for o in originals if o] or [int(config.max_position_embeddings)])


def _state(module: nn.Module) -> dict[str, Any]:
    plain = {name: value for name, value in vars(module).items() if not name.startswith("_") and name != "forward"}
    return plain | {name: buffer.clone() for name, buffer in module.named_buffers(recurse=False)}


def _restore(module: nn.Module, state: dict[str, Any]) -> None:
    for name, value in state.items():
        if name in module._buffers:
            module._buffers[name] = value.to(module._buffers[name].device)  # type: ignore[union-attr]
        else:
            setattr(module, name, value)
