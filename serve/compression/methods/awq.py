"""AWQ (Lin et al., arXiv 2306.00978): protect the channels that carry much, by scaling instead of by keeping them.

About 1 % of the input channels are far louder than the rest, and a rounding error on their weights is the one that
is heard. Multiplying those weight columns by s > 1 before rounding, and dividing the channel by s in whatever produces
it, changes nothing in exact arithmetic; but as long as the group's largest weight stays the same, so does the grid's
step, and the error on the loud channel shrinks by s. Too large an s coarsens everybody else's grid, so

    s = mean|x|^alpha / mean|w|^(beta),     alpha in 0 .. 1, beta in {0, 1 - alpha}

is searched for the least squared error of the layer's outputs, tr(D H D^T) with H the Gram matrix of the inputs.
`alpha = 0, beta = 0` is no scaling at all, so the search never loses to it on the calibration text. Afterwards each
group's range is clipped where that helps its outputs. Folding s into the producer is the caller's.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from serve.compression.formats.integer_grid import GroupedWeight, IntegerGrid
from serve.compression.methods.gptq import check_gram, layer_loss
from serve.compression.methods.rtn import check_weight, round_to_nearest

__all__ = ["awq", "search_scales"]

_STEPS = 10  # alphas tried between 0 and 1, with and without the weights' share
_SEARCHED_ROWS = 256  # of each matrix: one scale serves all rows, so a sample of them finds it
_LARGEST_RATIO = 1e4  # between two channels' scales


def search_scales(
    weights: Sequence[Tensor],
    gram: Tensor,
    mean_abs: Tensor,
    grid: IntegerGrid,
    *,
    channel: Tensor | None = None,
    candidates: int = 1,
    name: str = "weight",
) -> Tensor:
    """The best factor for each input channel of sibling `weights [out_features, in_features]`: float32 `[channels]`.

    `gram [in, in]` and `mean_abs [in]` are of their shared input. `channel [in_features]` says which factor an input
    takes, where inputs share one (heads that share a value under GQA); None: each its own. Weights are to be multiplied
    by the factors, the producer divided. Raises `CompressionError` naming the layer if numbers are not finite.
    """
    for weight in weights:
        check_weight(weight, name)
    check_gram(gram, weights[0].shape[1], name)
    channel = torch.arange(mean_abs.shape[0], device=mean_abs.device) if channel is None else channel
    sample = [_sample_rows(weight).float() for weight in weights]
    loudness = _per_channel(mean_abs.float(), channel)
    size = _per_channel(_relative_size(sample, grid), channel)
    tried = [torch.ones_like(loudness)]
    for alpha in torch.linspace(0, 1, _STEPS + 1).tolist()[1:]:
        tried += [_normalised(loudness**alpha), _normalised(loudness**alpha / size ** (1 - alpha))]
    losses = [_loss(sample, gram, scale[channel], grid, candidates) for scale in tried]
    return tried[min(range(len(tried)), key=losses.__getitem__)]


def awq(
    weight: Tensor,
    gram: Tensor,
    grid: IntegerGrid,
    scale: Tensor | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    candidates: int = 8,
    name: str = "weight",
) -> GroupedWeight:
    """Round `weight [out_features, in_features]` times `scale [in_features]`, clipping for its outputs' sake.

    `gram` is of the inputs before they are divided by `scale`. Zeros stay zeros.
    """
    if scale is not None:
        weight, gram = weight * scale, gram / scale[:, None] / scale
    check_gram(gram, weight.shape[1], name)
    return round_to_nearest(weight, grid, dtype=dtype, candidates=candidates, gram=gram, name=name)


def _loss(weights: Sequence[Tensor], gram: Tensor, scale: Tensor, grid: IntegerGrid, candidates: int) -> float:
    rounded = (awq(weight, gram, grid, scale, candidates=candidates).dequantize() / scale for weight in weights)
    return sum(layer_loss(new - old, gram) for new, old in zip(rounded, weights, strict=True))


def _sample_rows(weight: Tensor) -> Tensor:
    step = max(1, weight.shape[0] // _SEARCHED_ROWS)
    return weight[::step]


def _relative_size(weights: Sequence[Tensor], grid: IntegerGrid) -> Tensor:
    """How large each input's weights are on average, as a share of the largest of their group: `[in_features]`."""
    stacked = torch.cat([weight.abs() for weight in weights])
    columns = grid.columns_per_group(stacked.shape[1])
    shares = [part / part.amax(1, keepdim=True).clamp_min(1e-12) for part in torch.split(stacked, columns, dim=1)]
    return torch.cat(shares, 1).mean(0)


def _per_channel(values: Tensor, channel: Tensor) -> Tensor:
    """The mean over the inputs that share a factor: `[in_features]` to `[channels]`."""
    count = int(channel.max()) + 1
    total = torch.zeros(count, device=values.device).index_add_(0, channel, values)
    return total / torch.bincount(channel, minlength=count)


def _normalised(scale: Tensor) -> Tensor:
    """Centred around 1 and of bounded spread; a channel that is silent, or has no weight, is left alone."""
    usable = scale.isfinite() & (scale > 0)
    if not bool(usable.any()):
        return torch.ones_like(scale)
    centre = (scale[usable].max() * scale[usable].min()).sqrt()
    scale = (scale / centre).clamp(_LARGEST_RATIO**-0.5, _LARGEST_RATIO**0.5)
    return torch.where(usable, scale, torch.ones_like(scale))
