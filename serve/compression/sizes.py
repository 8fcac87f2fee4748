"""How large a cut model is: fewer layers, or fewer heads and channels, from the configuration and the share alone.

So an artifact's empty model is built without calibrating. Which layers and parts go is `serve.compression.structure`'s.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from math import log
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import PretrainedConfig

from serve.compression.stages import Depth, Structure, Structured
from serve.errors import RecipeError

__all__ = ["between", "choose_layers", "cut_config", "way"]

_CHANNEL_MULTIPLE = 32  # what kernels like a dimension to be divisible by


def cut_config(config: PretrainedConfig, stage: Structure) -> PretrainedConfig:
    """The configuration of the cut model, valid for transformers. Raise `RecipeError` if `stage` cannot be met."""
    smaller = deepcopy(config)
    text: Any = smaller.get_text_config(decoder=True)
    if isinstance(stage, Depth):
        _cut_layers(text, stage)
    elif isinstance(stage, Structured):
        _cut_width(text, stage)
    return smaller


def choose_layers(config: PretrainedConfig, layers: Sequence[int]) -> PretrainedConfig:
    """The configuration of a model that has these layers only."""
    smaller = deepcopy(config)
    text: Any = smaller.get_text_config(decoder=True)
    kinds = getattr(text, "layer_types", None)
    if kinds is not None:
        text.layer_types = [kinds[layer] for layer in layers]
    text.num_hidden_layers = len(layers)
    return smaller


def between(config: PretrainedConfig, goal: PretrainedConfig, fraction: float) -> PretrainedConfig:
    """A size on the way from `config` to the smaller `goal`, which `fraction` 1 is; equal steps take equal shares.

    Where few numbers of heads are possible it has the nearest, lest all heads go in the last step.
    """
    begin, end = _sizes(config), _sizes(goal)
    exact = {name: begin[name] * (end[name] / begin[name]) ** fraction for name in begin}
    at = {name: round(size) for name, size in exact.items()}
    smaller = choose_layers(config, range(at["layers"]))
    text: Any = smaller.get_text_config(decoder=True)
    if begin.get("shared") != end.get("shared"):
        possible = [n for n in range(end["shared"], begin["shared"] + 1) if _can_have(text, n)]
        _set_heads(text, min(possible, key=lambda n: abs(log(n / exact["shared"]))))
    if begin.get("channels") != end.get("channels"):
        multiple = _CHANNEL_MULTIPLE if end["channels"] % _CHANNEL_MULTIPLE == 0 else 1
        text.intermediate_size = min(-(-at["channels"] // multiple) * multiple, begin["channels"])
    return smaller


def way(config: PretrainedConfig, goal: PretrainedConfig) -> list[PretrainedConfig]:
    """The cuts that lead from one size to the other, each in depth or in width; none where they are the same."""
    cuts, begin, end = [], _sizes(config), _sizes(goal)
    if begin["layers"] != end["layers"]:
        cuts.append(choose_layers(config, range(end["layers"])))
    if {**begin, "layers": 0} != {**end, "layers": 0}:
        cuts.append(goal)
    return cuts


def _sizes(config: PretrainedConfig) -> dict[str, int]:
    """The sizes that a cut changes, as far as the configuration names them."""
    text: Any = config.get_text_config(decoder=True)
    heads = getattr(text, "num_attention_heads", None)
    found = {
        "layers": text.num_hidden_layers,
        "shared": getattr(text, "num_key_value_heads", None) or heads,
        "channels": getattr(text, "intermediate_size", None),
    }
    return {name: size for name, size in found.items() if isinstance(size, int)}


def _cut_layers(text: Any, stage: Depth) -> None:
    layers: int = text.num_hidden_layers
    left = layers - round(layers * stage.share)
    if left in (0, layers):
        raise RecipeError(f"{stage.name}: of {layers} layers that is {'every' if left == 0 else 'not'} one")
    kinds = getattr(text, "layer_types", None)
    if kinds is not None:
        if len(set(kinds)) > 1:
            raise RecipeError(f"{stage.name}: its layers are of different kinds, and none can stand in for another")
        text.layer_types = list(kinds[:left])
    text.num_hidden_layers = left


def _cut_width(text: Any, stage: Structured) -> None:
    """Heads by the share as far as the architecture can express it, and channels for what is left of it."""
    sizes = ("hidden_size", "intermediate_size", "num_attention_heads")
    hidden, channels, heads = (getattr(text, name, None) for name in sizes)
    if not (isinstance(hidden, int) and isinstance(channels, int) and isinstance(heads, int)):
        raise RecipeError(f"{stage.name}: the configuration does not say {', '.join(sizes)}; use depth pruning")
    shared: int = getattr(text, "num_key_value_heads", None) or heads
    width: int = getattr(text, "head_dim", None) or hidden // heads
    kept = next(n for n in range(max(1, round(shared * (1 - stage.share))), shared + 1) if _can_have(text, n))
    per_group = 2 * hidden * width * (heads // shared + 1)  # parameters: q and o of each head, k and v once
    wanted = stage.share * (shared * per_group + 3 * hidden * channels) - (shared - kept) * per_group
    left = channels - max(0, round(wanted / (3 * hidden)))
    if left < 1:
        raise RecipeError(f"{stage.name}: more than the whole MLP would have to go; remove less")
    multiple = _CHANNEL_MULTIPLE if left > 2 * _CHANNEL_MULTIPLE else 1
    _set_heads(text, kept)
    text.intermediate_size = round(left / multiple) * multiple


def _can_have(text: Any, shared: int) -> bool:
    """Whether transformers accepts this many key-value heads; many models want heads to divide the hidden size."""
    attempt = deepcopy(text)
    _set_heads(attempt, shared)
    try:
        attempt.validate()
    except (StrictDataclassError, ValueError):
        return False
    return True


def _set_heads(text: Any, shared: int) -> None:
    heads: int = text.num_attention_heads
    before: int = getattr(text, "num_key_value_heads", None) or heads
    text.head_dim = getattr(text, "head_dim", None) or text.hidden_size // heads
    text.num_attention_heads = heads // before * shared
    text.num_key_value_heads = shared
