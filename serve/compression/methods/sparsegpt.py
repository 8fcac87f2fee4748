"""SparseGPT (Frantar and Alistarh, arXiv 2301.00774): what stays makes up for what goes.

GPTQ with zero as the only point that a pruned weight may round to. Columns are visited in order; removing w_nj costs
w_nj^2 / U_jj^2, where U is the upper Cholesky factor of the inverse Gram matrix of the inputs, so of each block of
columns the cheapest weights go, and their error is passed on to the columns not yet visited. The choice is made per
block, on weights that already make up for earlier ones; with 2:4 it is made at every fourth column.

`serve.compression.methods.gptq` has the derivation. The mask that comes out goes with the weights to the quantizer
that may follow.
"""

from __future__ import annotations

import torch
from torch import Tensor

from serve.compression.methods.gptq import check_gram, inverse_factor
from serve.compression.methods.magnitude import Pattern, keep_largest
from serve.compression.methods.rtn import check_weight

__all__ = ["sparsegpt"]

_BLOCK_COLUMNS = 128


def sparsegpt(
    weight: Tensor,
    gram: Tensor,
    sparsity: float,
    pattern: Pattern = "",
    *,
    damping: float = 0.01,
    name: str = "weight",
) -> tuple[Tensor, Tensor]:
    """Prune `weight [out_features, in_features]` given `gram [in_features, in_features]` of its inputs.

    Returns the updated weight, float32, and the mask of what stays. Raises `CompressionError` naming the layer if
    weights or inputs are not finite.
    """
    check_weight(weight, name)
    check_gram(gram, weight.shape[1], name)
    factor = inverse_factor(gram, damping, name)
    weight = weight.float().t().contiguous()  # [in_features, out_features]: a column of the paper is contiguous
    kept = torch.empty_like(weight, dtype=torch.bool)
    for start in range(0, weight.shape[0], _BLOCK_COLUMNS):
        block = slice(start, min(start + _BLOCK_COLUMNS, weight.shape[0]))
        error = _prune_block(weight[block], factor[block, block], kept[block], sparsity, pattern)
        weight[block.stop :].addmm_(factor[block, block.stop :].t(), error, alpha=-1)
    return weight.t().contiguous(), kept.t().contiguous()


def _prune_block(weight: Tensor, factor: Tensor, kept: Tensor, sparsity: float, pattern: Pattern) -> Tensor:
    """Choose and prune in `weight [columns, rows]`, in place, and write `kept`. Returns the errors."""
    errors = torch.empty_like(weight)
    diagonal = factor.diagonal()[:, None]
    if not pattern:
        score = (weight / diagonal).square_()
        kept.copy_(keep_largest(score.flatten()[None], sparsity).view_as(score))
    for j in range(weight.shape[0]):
        if pattern and j % 4 == 0:
            score = (weight[j : j + 4] / diagonal[j : j + 4]).square_()
            kept[j : j + 4] = keep_largest(score.t(), sparsity, pattern).t()
        pruned = weight[j] * kept[j]
        errors[j] = (weight[j] - pruned) / factor[j, j]
        weight[j] = pruned
        weight[j + 1 :].addr_(factor[j, j + 1 :], errors[j], alpha=-1)
    return errors
