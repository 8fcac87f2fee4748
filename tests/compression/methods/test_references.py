"""Every method that no test beside this one holds to it: the paper's arithmetic in plain numpy, float64, row by row.

`rtn`, `gptq`, `sparsegpt`, `smoothquant`, `structured` and `fp8` have theirs in their own files. No dimension here
divides by 8 or by the size of a group.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import NormalDist
from typing import Any, cast

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from serve.compression import methods
from serve.compression.formats.integer_grid import IntegerGrid
from serve.compression.formats.linear import CompressedLinear, LinearSpec
from serve.compression.method import Group, InputStatistics, Producer, Projection
from serve.compression.methods.awq import awq, search_scales
from serve.compression.methods.gptq import gptq
from serve.compression.methods.magnitude import Pattern, magnitude_mask
from serve.compression.methods.structured import block_influence
from serve.compression.methods.wanda import wanda_mask
from serve.compression.recipe import Recipe

Array = NDArray[np.float64]
SHAPES = [(13, 21), (7, 50), (5, 130)]
TOKENS = 60


def random(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def inputs(columns: int) -> Tensor:
    """Some channels louder than others, and correlated."""
    mixing = torch.eye(columns) + 0.3 * random(columns, columns, 5)
    return random(TOKENS, columns, 1) @ mixing * torch.exp(random(1, columns, 2))


def exact(tensor: Tensor) -> Array:
    return tensor.double().numpy()


def statistics(x: Tensor) -> InputStatistics:
    return InputStatistics(len(x), x.abs().mean(0), x.abs().amax(0), x.square().mean(0), x.t() @ x / len(x))


def compressed(recipe: str, weight: Tensor, x: Tensor | None = None, producer: Producer | None = None) -> Any:
    stage = Recipe.parse(recipe).quantizer
    assert stage is not None
    spec = LinearSpec("layer", weight.shape[1], weight.shape[0], False, torch.float32)
    seen = None if x is None else statistics(x)
    layer = methods.quantizer(stage).quantize(Group([Projection(spec, weight.clone())], producer), seen)[0]
    assert isinstance(layer, CompressedLinear)
    return layer


def assert_same_codes(found: Tensor, expected: Array) -> None:
    """But for a value that lies within float32's error of the middle between two."""
    difference = np.abs(exact(found) - expected)
    assert difference.max() <= 1
    assert (difference > 0).mean() < 0.005


def assert_near(found: Tensor, expected: Array) -> None:
    assert np.linalg.norm(exact(found) - expected) < 2e-3 * np.linalg.norm(expected)


def on_127_levels(rows: Array) -> tuple[Array, Array]:
    scale = np.abs(rows).max(1, keepdims=True) / 127
    return np.rint(rows / scale), scale


@pytest.mark.parametrize("shape", SHAPES)
def test_int8_rounds_rows_and_tokens_on_their_own_scales(shape: tuple[int, int]) -> None:
    weight, x = random(*shape), inputs(shape[1])
    layer = compressed("int8", weight)
    codes, scale = on_127_levels(exact(weight))
    tokens, token_scale = on_127_levels(exact(x))
    assert_same_codes(layer.weight, codes)
    assert_near(layer(x), tokens @ codes.T * token_scale * scale.T)


@pytest.mark.parametrize("shape", SHAPES)
def test_int8_weight_rounds_rows_and_leaves_tokens_alone(shape: tuple[int, int]) -> None:
    weight, x = random(*shape), inputs(shape[1])
    layer = compressed("int8-weight", weight)
    codes, scale = on_127_levels(exact(weight))
    assert_same_codes(layer.weight, codes)
    assert_near(layer(x), exact(x) @ (codes * scale).T)


@pytest.mark.parametrize("shape", SHAPES)
def test_llm_int8_stores_rows_and_the_largest_of_each(shape: tuple[int, int]) -> None:
    weight = random(*shape)
    layer = compressed("llm-int8", weight)
    codes, scale = on_127_levels(exact(weight))
    assert_same_codes(layer.weight, codes)
    assert_near(layer.absmax[:, None], 127 * scale)
    assert_near(layer.dequantize(), codes * scale)


class Absorbing:
    """A producer that remembers what was folded into it."""

    def __init__(self, channels: int) -> None:
        self.channels, self.scale = channels, torch.ones(channels)

    def spread(self, scale: Tensor) -> Tensor:
        return scale

    def divide(self, scale: Tensor) -> None:
        self.scale = scale


@pytest.mark.parametrize("alpha", [0.0, 0.5, 0.8])
@pytest.mark.parametrize("shape", SHAPES)
def test_int8_static_smooths_then_rounds_every_token_on_one_scale(shape: tuple[int, int], alpha: float) -> None:
    weight, x = random(*shape), inputs(shape[1])
    producer = Absorbing(shape[1])
    layer = compressed(f"int8-static-smooth{alpha}", weight, x, producer)
    w, tokens = exact(weight), exact(x)
    smooth = np.abs(tokens).max(0) ** alpha / np.abs(w).max(0) ** (1 - alpha) if alpha else np.ones(shape[1])
    codes, scale = on_127_levels(w * smooth)
    step = np.abs(tokens / smooth).max() / 127
    rounded = np.clip(np.rint(tokens / smooth / step), -127, 127)
    assert_near(producer.scale, smooth)
    assert_same_codes(layer.weight, codes)
    assert_near(layer(x / producer.scale), rounded @ codes.T * step * scale.T)


def nf4_levels() -> Array:
    """Of QLoRA, by its own words: 8 quantiles of a normal distribution above zero, 7 below, and an exact zero."""
    above, below = (
        np.array([NormalDist().inv_cdf(share) for share in np.linspace(0.9677083, 0.5, count)[:-1]]) for count in (9, 8)
    )
    return cast(Array, np.sort(np.concatenate([above, -below, [0.0]])) / above.max())


def eight_bit_floats() -> Array:
    """bitsandbytes' dynamic map: seven decades, each with twice the numbers of the one below it."""
    positive = [
        10.0 ** (decade - 6) * middle
        for decade in range(7)
        for edges in [np.linspace(0.1, 1, 2**decade + 1)]
        for middle in (edges[:-1] + edges[1:]) / 2
    ]
    return np.sort(np.array([*positive, *(-value for value in positive), 0.0, 1.0]))


def nearest(values: Array, levels: Array) -> Array:
    return cast(Array, levels[np.abs(values[..., None] - levels).argmin(-1)])


def blocks_of(values: Array, size: int) -> list[Array]:
    return [values[start : start + size] for start in range(0, len(values), size)]


@pytest.mark.parametrize("double", [False, True], ids=["single", "double"])
@pytest.mark.parametrize("shape", [*SHAPES, (131, 130)])
def test_nf4_takes_the_nearest_quantile_of_each_block(shape: tuple[int, int], double: bool) -> None:
    weight = random(*shape)
    blocks = blocks_of(exact(weight).ravel(), 64)
    largest = np.array([np.abs(block).max() for block in blocks])
    if double:
        offset = largest.mean()
        parts = blocks_of(largest - offset, 256)
        largest = np.concatenate([nearest(p / np.abs(p).max(), eight_bit_floats()) * np.abs(p).max() for p in parts])
        largest += offset
    # Which level is nearest is decided on the block's true maximum, as bitsandbytes does; the stored one scales it.
    true = [np.abs(block).max() for block in blocks]
    levels = nf4_levels()
    expected = [nearest(b / t, levels) * s for b, t, s in zip(blocks, true, largest, strict=True)]
    found = compressed("nf4-dq" if double else "nf4", weight).dequantize()
    assert_near(found, np.concatenate(expected).reshape(shape))


def gptq_by_definition(weight: Array, gram: Array, group: int, levels: int, symmetric: bool) -> Array:
    """Columns by falling size of their inputs; after each, invert what is left of H again."""
    order = np.argsort(-gram.diagonal(), kind="stable")
    weight, gram = weight[:, order].copy(), gram[np.ix_(order, order)]
    gram = gram + 0.01 * gram.diagonal().mean() * np.eye(len(gram))
    for j in range(weight.shape[1]):
        if j % group == 0:
            part = weight[:, j : j + group]
            low, high = np.minimum(part.min(1), 0), np.maximum(part.max(1), 0)
            scale = (2 * np.abs(part).max(1) if symmetric else high - low) / (levels - 1)
            zero = np.full(len(scale), levels / 2) if symmetric else np.rint(-low / scale)
        rounded = (np.clip(np.rint(weight[:, j] / scale + zero), 0, levels - 1) - zero) * scale
        inverse = np.linalg.inv(gram[j:, j:])
        weight[:, j:] -= np.outer((weight[:, j] - rounded) / inverse[0, 0], inverse[0])
        weight[:, j] = rounded
    natural = np.empty_like(weight)
    natural[:, order] = weight
    return natural


@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize(("rows", "columns", "group"), [(12, 21, 8), (8, 50, 16), (16, 130, 64)])
def test_gptq_in_activation_order_equals_its_definition(rows: int, columns: int, group: int, symmetric: bool) -> None:
    weight, x = random(rows, columns), inputs(columns).double()
    gram = (x.t() @ x / len(x)).float()
    grid = IntegerGrid(4, group, symmetric)
    ours = gptq(weight, gram, grid, candidates=1, sweeps=0, activation_order=True)
    expected = gptq_by_definition(exact(weight), exact(gram), group, 16, symmetric)
    same_rows = np.abs(exact(ours.dequantize()) - expected).max(1) < 1e-3
    assert (
        same_rows.mean() >= 0.75
    )  # a weight in the middle between two points may go either way, and its row then differs


def awq_rounded(weight: Array, group: int, shares: Sequence[float], gram: Array) -> Array:
    """4 bits with a zero point; of each group's candidates the one that costs its outputs least."""
    result = np.empty_like(weight)
    for start in range(0, weight.shape[1], group):
        part, h = weight[:, start : start + group], gram[start : start + group, start : start + group]
        low, high = np.minimum(part.min(1), 0)[:, None], np.maximum(part.max(1), 0)[:, None]
        plain = (high - low) / 15
        tried = [(plain, np.rint(-low / plain))]
        tried += [(plain * share, np.floor(np.clip(-low / plain, 0, 15))) for share in shares]
        tried += [(plain * share, np.ceil(np.clip(-low / plain, 0, 15))) for share in shares]
        rounded = [(np.clip(np.rint(part / s + z), 0, 15) - z) * s for s, z in tried]
        losses = np.stack([np.einsum("ri,ij,rj->r", r - part, h, r - part) for r in rounded])
        best = losses.argmin(0)
        result[:, start : start + group] = np.stack(rounded)[best, np.arange(len(part))]
    return result


@pytest.mark.parametrize("columns", [21, 50])
def test_awq_finds_the_scale_and_the_clipping_of_an_exhaustive_search(columns: int) -> None:
    weight, x, group = random(11, columns), inputs(columns), 16
    w, gram, loud = exact(weight), exact(x).T @ exact(x) / TOKENS, np.abs(exact(x)).mean(0)
    largest = np.concatenate([np.repeat(np.abs(w[:, s : s + group]).max(1)[:, None], len(w[0, s : s + group]), 1)
                              for s in range(0, columns, group)], 1)  # fmt: skip
    size = (np.abs(w) / largest).mean(0)
    family = [np.ones(columns)]
    for alpha in np.linspace(0.1, 1, 10):
        family += [s / np.sqrt(s.max() * s.min()) for s in (loud**alpha, loud**alpha / size ** (1 - alpha))]
    cost = [
        float(((d := awq_rounded(w * s, group, (), gram / np.outer(s, s)) / s - w) @ gram * d).sum()) for s in family
    ]
    stats, grid = statistics(x), IntegerGrid(4, group, symmetric=False)
    assert stats.gram is not None
    scale = search_scales([weight], stats.gram, stats.mean_abs, grid)
    assert_near(scale, family[int(np.argmin(cost))])
    s = exact(scale)
    expected = awq_rounded(w * s, group, np.linspace(1, 0.7, 8).tolist(), gram / np.outer(s, s))
    found = exact(awq(weight, stats.gram, grid, scale).dequantize())
    assert (np.abs(found - expected) < 1e-3 * np.abs(expected).max()).mean() > 0.97  # two candidates may cost the same


def best_of(score: Array, keep: int) -> set[int]:
    return set(sorted(range(len(score)), key=lambda k: (-score[k], k))[:keep])


def kept(score: Array, sparsity: float, pattern: Pattern) -> list[list[bool]]:
    """Row by row the largest; with 2:4 of every four neighbours two, of a short last group half, rounded up."""
    rows = []
    for row in score:
        width = 4 if pattern else len(row)
        groups = [(at, row[at : at + width]) for at in range(0, len(row), width)]
        best = {
            at + k
            for at, part in groups
            for k in best_of(part, -(-len(part) // 2) if pattern else len(part) - round(len(part) * sparsity))
        }
        rows.append([k in best for k in range(len(row))])
    return rows


@pytest.mark.parametrize(("sparsity", "pattern"), [(0.5, ""), (0.3, ""), (0.71, ""), (0.5, "2:4")])
@pytest.mark.parametrize("shape", SHAPES)
def test_magnitude_and_wanda_keep_what_sorting_keeps(shape: tuple[int, int], sparsity: float, pattern: Pattern) -> None:
    weight, square = random(*shape), inputs(shape[1]).square().mean(0)
    weight[1] = weight[0] = weight[0].round(decimals=1)  # many equal ones
    size = np.abs(exact(weight))
    whole = size if pattern else size.reshape(1, -1)
    found = magnitude_mask(weight, sparsity, pattern)
    assert found.reshape(whole.shape).tolist() == kept(whole, sparsity, pattern)
    # On numbers that float32 multiplies exactly, for the choice among equals is part of the claim.
    power = torch.exp2(square.log2().round() // 2 * 2)
    found = wanda_mask(weight, power, sparsity, pattern)
    assert found.tolist() == kept(size * np.sqrt(exact(power)), sparsity, pattern)


def test_depth_ranks_layers_by_the_mean_angle_they_turn() -> None:
    before, after = random(TOKENS, 21), random(TOKENS, 21, 1)
    b, a = exact(before), exact(after)
    cosine = (b * a).sum(1) / np.linalg.norm(b, axis=1) / np.linalg.norm(a, axis=1)
    assert block_influence(before, after).mean().item() == pytest.approx(1 - cosine.mean(), rel=1e-5)
