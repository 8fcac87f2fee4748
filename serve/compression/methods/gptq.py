"""GPTQ (Frantar et al., arXiv 2210.17323): round one input column at a time, and let the rest make up for it.

A layer is judged by its outputs, so the loss of a rounded matrix Q is tr((W - Q) H (W - Q)^T), with H = X^T X the Gram
matrix of the calibration inputs. When column j has been rounded, its error is passed on to the columns not yet rounded
in the proportion that cancels most of it. All those proportions are rows of U, the upper Cholesky factor of H^-1:

    error_j = (w_j - q_j) / U_jj,        w_k -= error_j U_jk for k > j,        loss added: error_j^2

Columns go in blocks, so that most of the work is one matrix product per block. On top of the paper:

- **the scale is chosen by what it costs**: when a group is reached, each candidate scale of `rtn` (clipped, and of
  either sign) rounds the group with error propagation, and each row keeps its cheapest. Symmetric 4-bit thereby
  matches what asymmetric achieved with plain scales.
- **sweeps**: afterwards every code is revisited, given all others, and moved to the point that lowers the loss
  (coordinate descent, as in QuantEase, arXiv 2309.01885).

`activation_order` takes the columns with the largest inputs first, while many columns are left to correct them.
Groups are then formed in that order, and the format stores the permutation.
"""

from __future__ import annotations

import torch
from torch import Tensor

from serve.compression.formats.integer_grid import GroupedWeight, IntegerGrid
from serve.compression.methods.rtn import Scales, assemble, candidate_scales, check_weight
from serve.errors import CompressionError

__all__ = ["check_gram", "factorize", "gptq", "inverse_factor", "layer_loss"]

_BLOCK_COLUMNS = 128
_INNER_COLUMNS = 16  # one at a time; everything wider is a matrix product
_SEARCHED_COLUMNS = 256  # a longer group is searched by its first columns, or candidates would cost more than GPTQ
_ROWS = 2048  # rounded at a time: rows know nothing of each other, and rounding one takes several times its weights
_LARGEST_DAMPING = 1.0


def gptq(
    weight: Tensor,
    gram: Tensor,
    grid: IntegerGrid,
    *,
    dtype: torch.dtype = torch.float32,
    damping: float = 0.01,
    activation_order: bool = False,
    candidates: int = 6,
    sweeps: int = 2,
    mask: Tensor | None = None,
    name: str = "weight",
) -> GroupedWeight:
    """Round `weight [out_features, in_features]` to `grid`, given `gram [in_features, in_features]` of its inputs.

    `damping`: share of the mean of H's diagonal that is added to it; raised by tenfolds where H stays singular.
    `candidates`: scales tried per group, 1 for the textbook one. `mask`: bool, True where a pruner kept the weight;
    the others come out as exact zeros. `dtype`: what scales are stored in.
    Raises `CompressionError` naming the layer if weights or inputs are not finite.
    """
    check_weight(weight, name)
    check_gram(gram, weight.shape[1], name)
    gram = gram.float()
    order = torch.argsort(gram.diagonal(), descending=True, stable=True) if activation_order else None
    factor = inverse_factor(gram, damping, name, order)
    gram = _reordered(gram, order)
    parts = []
    for start in range(0, weight.shape[0], _ROWS):
        rows = slice(start, start + _ROWS)
        kept = None if mask is None else _columns(mask, rows, order)
        original = _columns(weight, rows, order).float()
        if kept is not None:
            original *= kept
        rounded = original.clone()
        chosen = _round_groups(rounded, factor, grid, dtype, candidates, kept)
        for _ in range(sweeps):
            _sweep(original, rounded, gram, grid, chosen, kept)
        parts.append(assemble(grid, _codes(rounded, grid, chosen), chosen, dtype, order))
    return GroupedWeight.stack(parts)


def layer_loss(difference: Tensor, gram: Tensor) -> float:
    """tr(D H D^T): the squared output error that `difference [out_features, in_features]` causes, per token."""
    difference = difference.double()
    return ((difference @ gram.double()) * difference).sum().item()


def check_gram(gram: Tensor, in_features: int, name: str) -> None:
    """Raise `CompressionError` if calibration saw inputs that are not finite, or none of this layer's width."""
    if gram.shape != (in_features, in_features):
        raise CompressionError(f"{name}: calibration inputs are {gram.shape[0]} wide, the layer {in_features}")
    if not bool(gram.isfinite().all()):
        raise CompressionError(f"{name}: its calibration inputs contain NaN or infinity; calibrate in float32")


def inverse_factor(gram: Tensor, damping: float, name: str = "weight", order: Tensor | None = None) -> Tensor:
    """U with U^T U = (H + damping * mean(diag H) I)^-1, upper triangular, float32; computed in float64.

    Inputs that calibration never saw have zeros in H; damping alone decides for them, and they are rounded to nearest.
    `order`: in which H's rows and columns are taken. Beside H it takes three times as much memory.
    """
    mean = gram.diagonal().mean(dtype=torch.float64)
    if mean <= 0:
        return torch.eye(gram.shape[0], device=gram.device)
    while damping <= _LARGEST_DAMPING:
        matrix = _reordered(gram, order).to(torch.float64, copy=True).mT  # symmetric: `mT` is but LAPACK's layout
        matrix.diagonal().add_(damping * mean)
        if factorize(matrix):
            torch.cholesky_inverse(matrix, out=matrix)
            if factorize(matrix, upper=True):
                return matrix.float()
        damping *= 10
    raise CompressionError(f"{name}: the Gram matrix of its inputs is not positive; use more calibration text")


def factorize(matrix: Tensor, *, upper: bool = False) -> bool:
    """Cholesky in place, for the float64 matrices here are the largest there are; whether it exists, and is finite."""
    failed = torch.empty((), dtype=torch.int32, device=matrix.device)
    torch.linalg.cholesky_ex(matrix, upper=upper, out=(matrix, failed))
    return not failed and bool(matrix.sum().isfinite())  # a sum, for `isfinite` of all would copy the matrix


def _reordered(gram: Tensor, order: Tensor | None) -> Tensor:
    return gram if order is None else gram[order[:, None], order]


def _columns(matrix: Tensor, rows: slice, order: Tensor | None) -> Tensor:
    """Some rows of `matrix [rows, columns]` in memory of their own, transposed."""
    part = matrix[rows].t()
    return part.clone(memory_format=torch.contiguous_format) if order is None else part[order].contiguous()


# From here on weights lie transposed, `[in_features, out_features]`: what the paper calls a column is contiguous.


def _round_groups(
    weight: Tensor, factor: Tensor, grid: IntegerGrid, dtype: torch.dtype, candidates: int, kept: Tensor | None
) -> list[Scales]:
    """Round `weight` in place, first input to last. Returns the scales of each group."""
    chosen = []
    width = weight.shape[0]
    columns = grid.columns_per_group(width)
    for start in range(0, width, columns):
        stop = min(start + columns, width)
        searched = slice(start, min(stop, start + _SEARCHED_COLUMNS))
        tried = candidate_scales(weight[start:stop].t(), grid, dtype, candidates)
        scales = _cheapest(weight[searched], factor[searched, searched], tried, grid.levels, _at(kept, searched))
        for first in range(start, stop, _BLOCK_COLUMNS):
            block = slice(first, min(first + _BLOCK_COLUMNS, stop))
            error = _round_block(weight[block], factor[block, block], scales, grid.levels, _at(kept, block))
            weight[block.stop :].addmm_(factor[block, block.stop :].t(), error, alpha=-1)
        chosen.append(scales)
    return chosen


def _cheapest(weight: Tensor, factor: Tensor, tried: Scales, levels: int, kept: Tensor | None) -> Scales:
    """Round these columns with every candidate; each output keeps the one that lost least."""
    candidates = tried.scale.shape[0]
    if candidates == 1:
        return Scales(tried.scale[0], tried.zero_point[0])
    copies = weight[:, None].repeat(1, candidates, 1)
    error = _round_block(copies, factor, tried, levels, None if kept is None else kept[:, None])
    return tried.pick(error.square_().sum(0).argmin(0))


def _round_block(weight: Tensor, factor: Tensor, scales: Scales, levels: int, kept: Tensor | None) -> Tensor:
    """Round `weight [columns, ..., rows]` in place, propagating errors from column to column. Returns the errors."""
    errors = torch.empty_like(weight)
    for start in range(0, weight.shape[0], _INNER_COLUMNS):
        stop = min(start + _INNER_COLUMNS, weight.shape[0])
        for j in range(start, stop):
            rounded = scales.nearest(weight[j], levels)
            if kept is not None:
                rounded *= kept[j]
            errors[j] = (weight[j] - rounded) / factor[j, j]
            share = factor[j, j + 1 : stop].view(-1, *(1,) * rounded.ndim)
            weight[j + 1 : stop].addcmul_(share, errors[j], value=-1)
            weight[j] = rounded
        rest = weight[stop:].flatten(1)
        rest.addmm_(factor[start:stop, stop:].t(), errors[start:stop].flatten(1), alpha=-1)
    return errors


def _sweep(
    original: Tensor, rounded: Tensor, gram: Tensor, grid: IntegerGrid, chosen: list[Scales], kept: Tensor | None
) -> None:
    """Move each column of `rounded`, in place, to the grid points that cost least given all other columns."""
    columns = grid.columns_per_group(original.shape[0])
    residual = original - rounded
    for start in range(0, original.shape[0], _INNER_COLUMNS):
        stop = min(start + _INNER_COLUMNS, original.shape[0])
        missing = gram[start:stop] @ residual  # what the outputs still lack, seen from each column
        for j in range(start, stop):
            if gram[j, j] <= 0:
                continue
            moved = chosen[j // columns].nearest(rounded[j] + missing[j - start] / gram[j, j], grid.levels)
            if kept is not None:
                moved *= kept[j]
            missing.addr_(gram[start:stop, j], moved - rounded[j], alpha=-1)
            rounded[j], residual[j] = moved, original[j] - moved


def _codes(rounded: Tensor, grid: IntegerGrid, chosen: list[Scales]) -> Tensor:
    parts = torch.split(rounded, grid.columns_per_group(rounded.shape[0]))
    codes = [scales.codes(part, grid.levels) for scales, part in zip(chosen, parts, strict=True)]
    return torch.cat(codes).t().contiguous()


def _at(kept: Tensor | None, columns: slice) -> Tensor | None:
    return None if kept is None else kept[columns]
