"""What compressing one part of a model alone does to its answers: how sensitive each layer, or projection, is.

One part at a time is compressed while all others stay as they are, and the mean KL(dense || changed) over a text is
measured. Parts whose effect stands out are the ones to skip, or to keep at a higher precision.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch

from serve.compression.activations import BlockActivations
from serve.compression.compress import Progress, silent
from serve.compression.formats.linear import CompressedLinear
from serve.compression.method import Group, InputStatistics, Need, Projection
from serve.compression.plan import Plan
from serve.compression.sensitivity import DivergenceMeter
from serve.compression.skeleton import Skeleton, set_module, weight_of

__all__ = ["By", "Effect", "measure_effects"]

By = Literal["layer", "projection"]


@dataclass(frozen=True)
class Effect:
    """`kl_divergence` in nats per token, all else dense."""

    name: str
    kl_divergence: float
    weights: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@torch.no_grad()
def measure_effects(
    skeleton: Skeleton, samples: Sequence[Sequence[int]], plan: Plan, by: By, *, progress: Progress = silent
) -> list[Effect]:
    """Each part of a model that is filled and dense, in the model's order. Leaves the model as it was.

    What the recipe skips, and projections that the text never reached, have no part in it.
    """
    evaluate = DivergenceMeter.of(skeleton, samples, plan.device)
    activations = BlockActivations(skeleton, samples, plan.device)
    found = []
    for done, block in enumerate(skeleton.blocks):
        progress("sensitivity", done, len(skeleton.blocks))
        names = [name for name in skeleton.projections if name.startswith(f"{block}.")]
        names = [name for name in names if not plan.treatment(name).is_dense]
        need = max((plan.treatment(name).needs for name in names), default=Need.NOTHING)
        statistics = activations.measure(block, names, need) if need else {}
        names = [name for name in names if not need or name in statistics]
        made = {name: _compressed(skeleton, plan, name, statistics.get(name)) for name in names}
        parts = {block: list(made)} if by == "layer" else {name: [name] for name in made}
        for part, members in parts.items():
            if members:
                found.append(_effect(skeleton, part, {name: made[name] for name in members}, evaluate))
        activations.advance(block)
    return found


def _compressed(skeleton: Skeleton, plan: Plan, name: str, statistics: InputStatistics | None) -> CompressedLinear:
    module, treatment = skeleton.model.get_submodule(name), plan.treatment(name)
    weight = weight_of(module, module.get_parameter("weight")).float().clone()
    bias = module.bias if isinstance(module.bias, torch.Tensor) else None
    group = Group([Projection(skeleton.spec(name), weight, bias)])
    for pruner in treatment.pruners:
        pruner.prune(group, statistics)
    assert treatment.quantizer is not None
    return treatment.quantizer.quantize(group, statistics)[0]


def _effect(skeleton: Skeleton, part: str, layers: dict[str, CompressedLinear], evaluate: DivergenceMeter) -> Effect:
    weights = sum(layer.in_features * layer.out_features for layer in layers.values())
    dense = {name: skeleton.model.get_submodule(name) for name in layers}
    for name, layer in layers.items():
        layer.prepare()
        set_module(skeleton.model, name, layer)
    measured = evaluate()
    for name, module in dense.items():
        set_module(skeleton.model, name, module)
    return Effect(part, measured, weights)
