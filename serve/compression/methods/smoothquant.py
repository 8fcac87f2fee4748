"""SmoothQuant (Xiao et al., arXiv 2211.10438): move the outliers of the activations into the weights.

With both sides in 8 bits, a few loud channels of the activations stretch the grid of a whole token or tensor until
the others round to nothing, while weights are easy to round. Dividing channel j of the input by

    s_j = max|x_j|^alpha / max|w_j|^(1 - alpha)

and multiplying weight column j by it changes no product and evens out who is hard to round: alpha = 0 leaves the
activations as they are, alpha = 1 flattens them entirely. Folding s into the producer is the caller's.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from serve.compression.methods.rtn import check_weight
from serve.errors import CompressionError

__all__ = ["smooth_scales"]

_SMALLEST = 1e-5


def smooth_scales(
    weights: Sequence[Tensor],
    max_abs: Tensor,
    alpha: float = 0.5,
    *,
    channel: Tensor | None = None,
    name: str = "weight",
) -> Tensor:
    """The factor of each input channel of sibling `weights [out_features, in_features]`: float32 `[channels]`.

    `max_abs [in_features]` is the largest magnitude that calibration saw at each input. `channel [in_features]` says
    which factor an input takes where several share one. A channel that was always silent, or has no weight, keeps 1.
    Raises `CompressionError` naming the layer if numbers are not finite.
    """
    for weight in weights:
        check_weight(weight, name)
    if not bool(max_abs.isfinite().all()):
        raise CompressionError(f"{name}: its calibration inputs contain NaN or infinity; calibrate in float32")
    largest = torch.stack([weight.float().abs().amax(0) for weight in weights]).amax(0)
    loud = max_abs.float()
    if channel is not None:
        loud, largest = _largest_of(loud, channel), _largest_of(largest, channel)
    scale = loud.clamp_min(_SMALLEST) ** alpha / largest.clamp_min(_SMALLEST) ** (1 - alpha)
    return torch.where((loud > 0) & (largest > 0), scale.clamp_min(_SMALLEST), torch.ones_like(scale))


def _largest_of(values: Tensor, channel: Tensor) -> Tensor:
    result = torch.zeros(int(channel.max()) + 1, device=values.device)
    return result.scatter_reduce_(0, channel, values, "amax")
