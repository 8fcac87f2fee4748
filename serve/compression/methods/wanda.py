"""Wanda (Sun et al., arXiv 2306.11695): a weight matters as much as what it multiplies.

The score of a weight is |w_nk| * ||x_k||, its magnitude times the norm of its input over the calibration text, and it
is compared within its own row only, so that every output keeps the same number of inputs. Nothing is updated and
nothing is inverted: one multiplication and a sort, and at 50 % far better than magnitude.
"""

from __future__ import annotations

from torch import Tensor

from serve.compression.methods.magnitude import Pattern, keep_largest
from serve.compression.methods.rtn import check_weight
from serve.errors import CompressionError

__all__ = ["wanda_mask"]


def wanda_mask(
    weight: Tensor, mean_square: Tensor, sparsity: float, pattern: Pattern = "", name: str = "weight"
) -> Tensor:
    """Bool `[out_features, in_features]`, True where a weight stays.

    `mean_square [in_features]` is that of each input over the calibration text. Where all inputs of a comparison were
    silent the first weights stay. Raises `CompressionError` naming the layer if weights or inputs are not finite.
    """
    check_weight(weight, name)
    if not bool(mean_square.isfinite().all()):
        raise CompressionError(f"{name}: its calibration inputs contain NaN or infinity; calibrate in float32")
    return keep_largest(weight.float().abs() * mean_square.float().sqrt(), sparsity, pattern)
