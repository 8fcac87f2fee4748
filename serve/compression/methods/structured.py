"""Structured pruning: whole parts go, and the model that stays is smaller and dense, so it is faster everywhere.

A part is a run of neighbouring input columns of a projection: one column of an MLP's last projection is one of its
channels; the columns of attention's output projection that belong to one key-value head, with all query heads that
share it, are that head. Removing part S and letting the other columns make up for it costs, by the optimal brain
surgeon (Hassibi and Stork, 1992), on the outputs of that projection W over the calibration text

    cost(S) = tr(W_S (H^-1_SS)^-1 W_S^T),        H the Gram matrix of its inputs

The cheapest go, a share at a time with the costs computed anew (after ZipLM, Kurtic et al., arXiv 2302.04089),
for parts that say the same are cheap until all but one are gone. What stays is then refitted by least squares:
W' = W H_:K (H_KK)^-1.

Depth: a whole layer is worth as much as it changes what passes through it. ShortGPT (Men et al., arXiv 2403.03853)
measures that as block influence, 1 - cos(before, after), averaged over tokens; layers with the least go first.
"""

from __future__ import annotations

import torch
from torch import Tensor

from serve.compression.methods.gptq import check_gram, factorize
from serve.compression.methods.rtn import check_weight
from serve.errors import CompressionError

__all__ = ["block_influence", "choose_parts", "part_columns", "refit"]

_ROUNDS = 8
_PANEL = 256  # columns handled at a time where float64 copies of all would be large


def choose_parts(
    weight: Tensor, gram: Tensor, width: int, keep: int, *, damping: float = 0.01, name: str = "weight"
) -> Tensor:
    """The `keep` parts of `width` columns whose removal would cost most: their indices in order, int64 `[keep]`.

    `weight [out_features, in_features]` reads the parts, `gram [in_features, in_features]` is of its inputs. Raises
    `CompressionError` naming the layer if numbers are not finite.
    """
    check_weight(weight, name)
    check_gram(gram, weight.shape[1], name)
    parts = weight.shape[1] // width
    if weight.shape[1] % width or not 0 < keep <= parts:
        raise CompressionError(f"{name}: cannot keep {keep} parts of {width} of its {weight.shape[1]} inputs")
    weight = weight.double()
    kept = torch.arange(parts, device=weight.device)
    for left in _schedule(parts, keep):
        factor, fitted = _solve(weight, gram, part_columns(kept, width), damping, name)
        costs = _costs(fitted, torch.cholesky_inverse(factor, out=factor), width)
        del factor, fitted  # before the next round makes its own
        stay = torch.sort(costs, descending=True, stable=True).indices[:left]
        kept = kept[stay.sort().values]
    return kept


def refit(weight: Tensor, gram: Tensor, columns: Tensor, *, damping: float = 0.01, name: str = "weight") -> Tensor:
    """The weight `[out_features, kept]` on inputs `columns [kept]` alone that comes closest to `weight`'s outputs.

    Computed in float64, returned in `weight`'s type. Inputs that were never seen keep their weights. Raises
    `CompressionError` naming the layer if `gram` is no Gram matrix.
    """
    _, fitted = _solve(weight.double(), gram, columns, damping, name)
    return fitted.to(weight.dtype)


def part_columns(parts: Tensor, width: int) -> Tensor:
    """The columns of parts of `width` columns each, part by part: int64 `[len(parts) * width]`."""
    return (parts[:, None] * width + torch.arange(width, device=parts.device)).flatten()


def block_influence(before: Tensor, after: Tensor) -> Tensor:
    """1 - cos(before, after) of each token, float32 `[tokens]`: 0 where a layer changes nothing but the length.

    `before` and `after` are the hidden states `[..., hidden]` that enter and leave it. A token of zeros, which has no
    direction, counts as unchanged if it stays zero and as changed entirely if it doesn't.
    """
    before, after = before.reshape(-1, before.shape[-1]).float(), after.reshape(-1, after.shape[-1]).float()
    similarity = torch.nn.functional.cosine_similarity(before, after, dim=-1)
    silent = (before == 0).all(-1) & (after == 0).all(-1)
    return torch.where(silent, torch.zeros_like(similarity), 1 - similarity)


def _solve(weight: Tensor, gram: Tensor, columns: Tensor, damping: float, name: str) -> tuple[Tensor, Tensor]:
    """The Cholesky factor of the damped H_KK, float64 `[kept, kept]`, and the refitted `weight [out_features, kept]`.

    H + damping * mean(diag H) I, or the identity where nothing was seen, is never made whole: in float64 it would take
    twice the memory of H. What it is needed for is computed from H a panel at a time, and in place.
    """
    mean = float(gram.diagonal().mean(dtype=torch.float64))
    shift = damping * mean if mean > 0 else 1.0
    matrix = torch.zeros(len(columns), len(columns), dtype=torch.float64, device=gram.device)
    fitted = weight[:, columns].mul_(shift)  # so far W H_:K
    for start in range(0, len(columns), _PANEL) if mean > 0 else ():
        panel = slice(start, start + _PANEL)
        rows = gram[columns[panel]].double()  # of H, which is symmetric
        matrix[panel] = rows[:, columns]
        fitted[:, panel] += weight @ rows.t()
    matrix.diagonal().add_(shift)
    factor = matrix.mT  # LAPACK's layout
    if not factorize(factor):
        raise CompressionError(f"{name}: the Gram matrix of its inputs is not positive; use more calibration text")
    solved = fitted.mT
    torch.linalg.solve_triangular(factor, solved, upper=False, out=solved)
    torch.linalg.solve_triangular(factor.mT, solved, upper=True, out=solved)
    return factor, fitted


def _costs(weight: Tensor, inverse: Tensor, width: int) -> Tensor:
    """What the removal of each part of `weight` would cost, `[parts]`, given (H_KK)^-1."""
    parts = weight.shape[1] // width
    blocks = inverse.view(parts, width, parts, width).diagonal(dim1=0, dim2=2).permute(2, 0, 1)  # [parts, width, width]
    slices = weight.t().view(parts, width, -1)  # W_S^T
    some = max(1, _PANEL // width)
    costs = [
        (part * torch.linalg.solve(block, part)).sum((1, 2))
        for block, part in zip(torch.split(blocks, some), torch.split(slices, some), strict=True)
    ]
    return torch.cat(costs)


def _schedule(parts: int, keep: int) -> list[int]:
    """How many parts are left after each round."""
    rounds = min(_ROUNDS, parts - keep)
    return [parts - round((parts - keep) * done / rounds) for done in range(1, rounds + 1)]
