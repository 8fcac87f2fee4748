"""What a recipe would weigh, told from the configuration alone, so that nothing too large is ever tried."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from serve.compression.recipe import Recipe
from serve.fresh_process import Progress, run

__all__ = ["Footprint", "footprints"]


@dataclass(frozen=True)
class Footprint:
    """`model_bytes` by recipe; those that this machine refuses are in `refused`, with the reason.

    `kv_bytes` are the 16-bit keys and values of one sequence of full context, by recipe.
    """

    dense_bytes: int  # in float32
    model_bytes: dict[str, int]
    kv_bytes: dict[str, int]
    refused: dict[str, str]


def footprints(progress: Progress, source: str, recipes: list[Recipe], device: str) -> Footprint:
    """In a process of its own, which may load torch."""
    return run(progress, measure, source, recipes, device)


def measure(progress: Progress, source: str, recipes: list[Recipe], device: str) -> Footprint:
    from serve.compression.loader import find_device
    from serve.errors import SetupError

    found = Footprint(0, {}, {}, {})
    for recipe in recipes:
        try:
            dense, model, kv = _weigh(source, recipe, find_device(device))
        except SetupError as error:
            found.refused[recipe.name] = error.message
            continue
        found.model_bytes[recipe.name], found.kv_bytes[recipe.name] = model, kv
        found = Footprint(max(dense, found.dense_bytes), found.model_bytes, found.kv_bytes, found.refused)
    return found


def _weigh(source: str, recipe: Recipe, device: Any) -> tuple[int, int, int]:
    from serve.compression.loader import context_length
    from serve.compression.plan import Plan
    from serve.compression.sizes import cut_config
    from serve.compression.skeleton import DTYPES, build
    from serve.compression.source import Source

    config = Source.find(source).config
    whole = sum(parameter.numel() for parameter in build(config, DTYPES["fp32"]).model.parameters())
    for stage in recipe.structures:
        config = cut_config(config, stage)
    skeleton, plan = build(config, DTYPES[recipe.dtype]), Plan(recipe, device)
    total = sum(parameter.nbytes for parameter in skeleton.model.parameters())
    for name in skeleton.projections:
        spec, treatment = skeleton.spec(name), plan.treatment(name)
        if treatment.quantizer is not None and not treatment.pruners:
            stored = treatment.quantizer.shell(spec).storage()
            dense = spec.in_features * spec.out_features * skeleton.dtype.itemsize
            total += stored.weight_bytes + stored.metadata_bytes - dense
    text: Any = config.get_text_config(decoder=True)
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    context = context_length(config, _NoTokenizer())  # type: ignore[arg-type]
    return 4 * whole, total, 2 * 2 * text.num_hidden_layers * heads * width * context


class _NoTokenizer:
    """Where the configuration says nothing of a context."""

    model_max_length = 2048
