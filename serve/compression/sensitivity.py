"""How much each projection matters, and which precision it should get under a budget of bits.

Every projection is compressed alone, with all others dense, and the divergence of the model's answers is measured over
a short text. One coarse format is tried that way. What finer ones would do follows from it: to second order the
divergence is quadratic in what changes at the layer's outputs, so it shrinks as tr(D H D^T) does, D being the change of
the weight and H the Gram matrix of the inputs. Divergences of different layers very nearly add up.

Choosing is then a knapsack: start with the fewest bits everywhere, and buy, again and again, the upgrade that removes
the most divergence per bit, until the budget is spent (after HAWQ-V2, arXiv 1911.03852, with measured divergences).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from serve.compression import methods
from serve.compression.activations import BlockActivations
from serve.compression.compress import NoNotes, Notes, Progress, silent
from serve.compression.formats.linear import CompressedLinear, LinearSpec
from serve.compression.method import Group, InputStatistics, Need, Projection
from serve.compression.methods.gptq import layer_loss
from serve.compression.recipe import Recipe
from serve.compression.skeleton import DTYPES, Skeleton, set_module, weight_of
from serve.compression.stages import Mixed, Stage

__all__ = ["CANDIDATES", "Choice", "DivergenceMeter", "choose", "measure_sensitivity", "mix"]

CANDIDATES = (
    "gptq2-g64", "gptq3-g128", "gptq3-g64-asym", "gptq4", "gptq4-g64", "gptq4-g64-asym", "gptq4-g32", "gptq4-g32-asym",
    "gptq8", "bf16", "fp32",
)  # fmt: skip
_PROBE = "gptq3-g64-asym"
_SAMPLES = 32
_REFERENCE_BYTES = 512 << 20  # the reference's logits, kept in memory


@dataclass(frozen=True)
class Choice:
    """What one projection would cost and lose in one format; `bits` per weight count scales and zero points."""

    recipe: str
    bits: float
    kl_divergence: float  # nats per token, all else dense

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@torch.no_grad()
def measure_sensitivity(
    skeleton: Skeleton,
    samples: Sequence[Sequence[int]],
    device: torch.device,
    candidates: Sequence[str] = CANDIDATES,
    *,
    dtype: torch.dtype = torch.bfloat16,
    progress: Progress = silent,
    notes: Notes | None = None,
) -> dict[str, list[Choice]]:
    """For every projection of a model that is filled and dense, what each candidate would do. Leaves it as it was.

    Bits are counted with scales in `dtype`, whatever type the measurement is made in. A block that `notes` has is not
    measured again.
    """
    notes = notes or NoNotes()
    evaluate = DivergenceMeter.of(skeleton, samples, device)
    activations = BlockActivations(skeleton, samples, device)
    found: dict[str, list[Choice]] = {}
    for done, block in enumerate(skeleton.blocks):
        progress("sensitivity", done, len(skeleton.blocks))
        names = [name for name in skeleton.projections if name.startswith(f"{block}.")]
        known = notes.recall(note := f"sensitivity-{block}")
        if known is None:
            statistics = activations.measure(block, names, Need.GRAM)
            reached = [name for name in names if name in statistics]
            measured = {
                name: _measure_one(skeleton, name, statistics[name], candidates, evaluate, dtype) for name in reached
            }
            notes.remember(note, {name: [choice.to_dict() for choice in made] for name, made in measured.items()})
        else:
            measured = {name: [Choice(**choice) for choice in known[name]] for name in names if name in known}
        found |= measured
        activations.advance(block)
    return found


def mix(
    recipe: Recipe,
    skeleton: Skeleton,
    samples: Sequence[Sequence[int]],
    device: torch.device,
    *,
    progress: Progress = silent,
    notes: Notes | None = None,
) -> Recipe:
    """`recipe` with a precision for every projection, measured on a filled and dense `skeleton`.

    Overrides that the recipe already has keep their say, and their bits do not count against the budget.
    """
    stage = recipe.quantizer
    assert isinstance(stage, Mixed)
    dtype = DTYPES[recipe.dtype]
    text = samples[:_SAMPLES]
    choices = measure_sensitivity(skeleton, text, device, dtype=dtype, progress=progress, notes=notes)
    weights = {name: skeleton.spec(name).in_features * skeleton.spec(name).out_features for name in choices}
    chosen = choose(choices, weights, stage.budget_bits)
    return replace(recipe, overrides=(*recipe.overrides, *chosen.items()))


def choose(choices: Mapping[str, Sequence[Choice]], weights: Mapping[str, int], budget_bits: float) -> dict[str, str]:
    """A recipe per projection with at most `budget_bits` per weight on average; `weights` counts those of each.

    Where even the fewest bits exceed the budget, that is what is returned.
    """
    steps = {name: _frontier(found) for name, found in choices.items()}
    level = dict.fromkeys(steps, 0)
    spent = sum(steps[name][0].bits * weights[name] for name in steps)
    total = budget_bits * sum(weights[name] for name in steps)
    while True:
        affordable = [
            (name, to)
            for name, at in level.items()
            for to in range(at + 1, len(steps[name]))
            if spent + _price(steps[name], at, to) * weights[name] <= total
        ]
        if not affordable:
            return {name: steps[name][at].recipe for name, at in level.items()}
        name, to = max(affordable, key=lambda move: _gain(steps[move[0]], level[move[0]], move[1], weights[move[0]]))
        spent += _price(steps[name], level[name], to) * weights[name]
        level[name] = to


def _measure_one(
    skeleton: Skeleton,
    name: str,
    statistics: InputStatistics,
    candidates: Sequence[str],
    evaluate: Callable[[], float],
    dtype: torch.dtype,
) -> list[Choice]:
    module = skeleton.model.get_submodule(name)
    weight = weight_of(module, module.get_parameter("weight")).float()
    assert statistics.gram is not None
    losses: dict[str, float] = {}
    for recipe in dict.fromkeys((_PROBE, *candidates)):  # one at a time, for each takes a float32 copy of the weight
        if _stage(recipe) is None:
            value, layer = weight.to(_dtype(recipe)).float(), None
        else:
            layer = _compressed(skeleton, name, weight, statistics, recipe)
            value = layer.dequantize()
        losses[recipe] = layer_loss(value - weight, statistics.gram)
        if recipe == _PROBE and layer is not None:
            probe = layer
    bits = {recipe: _bits(replace(skeleton.spec(name), dtype=dtype), recipe) for recipe in candidates}
    probe.prepare()
    set_module(skeleton.model, name, probe)
    measured = evaluate()
    set_module(skeleton.model, name, module)
    scale = measured / losses[_PROBE] if losses[_PROBE] > 0 else 0.0
    return [Choice(recipe, bits[recipe], losses[recipe] * scale) for recipe in candidates]


def _compressed(
    skeleton: Skeleton, name: str, weight: Tensor, statistics: InputStatistics, recipe: str
) -> CompressedLinear:
    stage = _stage(recipe)
    assert stage is not None
    bias = skeleton.model.get_submodule(name).bias
    group = Group([Projection(skeleton.spec(name), weight.clone(), bias if isinstance(bias, Tensor) else None)])
    return methods.quantizer(stage).quantize(group, statistics)[0]


def _stage(recipe: str) -> Stage | None:
    return Recipe.parse(recipe).quantizer


def _dtype(recipe: str) -> torch.dtype:
    return DTYPES[Recipe.parse(recipe).dtype]


def _bits(spec: LinearSpec, recipe: str) -> float:
    """Bits per weight as stored, metadata counted."""
    stage = _stage(recipe)
    if stage is None:
        return 8.0 * _dtype(recipe).itemsize
    storage = methods.quantizer(stage).shell(spec).storage()
    return 8 * (storage.weight_bytes + storage.metadata_bytes) / (spec.in_features * spec.out_features)


@dataclass
class DivergenceMeter:
    """Mean KL(reference || model as it now is) over some tokens."""

    skeleton: Skeleton
    batches: list[Tensor]
    reference: list[Tensor]  # log-probabilities, float32 [tokens, vocabulary] each

    @classmethod
    def of(cls, skeleton: Skeleton, samples: Sequence[Sequence[int]], device: torch.device) -> DivergenceMeter:
        vocabulary = skeleton.model.config.get_text_config(decoder=True).vocab_size
        left = max(_REFERENCE_BYTES // (4 * vocabulary), 64)
        batches = []
        for ids in [ids for ids in samples if len(ids) > 1] or [ids for ids in samples if len(ids)]:
            if left > 1:
                batches.append(torch.tensor([list(ids[:left])], device=device))
                left -= batches[-1].numel()
        self = cls(skeleton, batches, [])
        self.reference = [self._log_probabilities(ids) for ids in batches]
        return self

    def __call__(self) -> float:
        total = torch.zeros((), dtype=torch.float64)
        for ids, p in zip(self.batches, self.reference, strict=True):
            total += (p.exp() * (p - self._log_probabilities(ids))).sum().double().cpu()
        return total.item() / sum(p.shape[0] for p in self.reference)

    def _log_probabilities(self, ids: Tensor) -> Tensor:
        logits: Tensor = self.skeleton.model(input_ids=ids, use_cache=False).logits
        return logits[0].float().log_softmax(-1)


def _frontier(found: Sequence[Choice]) -> list[Choice]:
    """Fewest bits first, without those that cost more and lose no less."""
    kept: list[Choice] = []
    for choice in sorted(found, key=lambda choice: (choice.bits, choice.kl_divergence)):
        if not kept or choice.kl_divergence < kept[-1].kl_divergence:
            kept.append(choice)
    return kept


def _price(steps: Sequence[Choice], at: int, to: int) -> float:
    return steps[to].bits - steps[at].bits


def _gain(steps: Sequence[Choice], at: int, to: int, weights: int) -> float:
    """Divergence removed per bit."""
    return (steps[at].kl_divergence - steps[to].kl_divergence) / (_price(steps, at, to) * weights)
