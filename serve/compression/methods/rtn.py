"""Round to nearest: every weight goes to the closest point of its group's grid. The baseline, and the grid of the rest.

A grid of 2**bits points has only a scale (and a zero point) to choose. Plain absmax spans the largest weight of the
group and wastes points where weights are dense. Two cheap things help, and GPTQ and AWQ here use both:

- **clipping**: a somewhat smaller scale saturates the largest weight and serves all others better;
- **sign**: the symmetric grid -8..7 is lopsided, so a *negative* scale is a different grid, one that reaches further
  on the other side. It costs no bit, and every kernel multiplies by it as by any other scale.

So a group gets a handful of candidate scales, and whoever rounds keeps the one that loses least.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from serve.compression.formats.integer_grid import GroupedWeight, IntegerGrid
from serve.errors import CompressionError

__all__ = ["Scales", "absmax_scales", "assemble", "candidate_scales", "check_weight", "round_to_nearest"]

_DEEPEST_CLIP = {2: 0.55, 3: 0.6, 4: 0.7, 8: 0.97}  # smallest candidate, as a share of the scale that clips nothing


@dataclass(frozen=True)
class Scales:
    """The grid of one group in each row, or several candidates of it: float32 `[..., rows]`, zero points whole."""

    scale: Tensor
    zero_point: Tensor

    def codes(self, weight: Tensor, levels: int) -> Tensor:
        """Codes of one column, or of one candidate each, nearest to `weight [..., rows]`: whole float32 numbers."""
        return (weight / self.scale + self.zero_point).round_().clamp_(0, levels - 1)

    def nearest(self, weight: Tensor, levels: int) -> Tensor:
        """The grid points nearest to `weight [..., rows]`."""
        return self.codes(weight, levels).sub_(self.zero_point).mul_(self.scale)

    def pick(self, best: Tensor) -> Scales:
        """Candidate `best [rows]` of each row."""
        return Scales(self.scale.gather(0, best[None])[0], self.zero_point.gather(0, best[None])[0])


def absmax_scales(weight: Tensor, grid: IntegerGrid, dtype: torch.dtype) -> Scales:
    """The textbook scale of each row of `weight [rows, columns]`: nothing is clipped by more than half a step."""
    if grid.symmetric:
        scale = _storable(weight.abs().amax(1) * 2 / (grid.levels - 1), dtype)
        return Scales(scale, torch.full_like(scale, grid.middle))
    low, high = weight.amin(1).clamp_max(0), weight.amax(1).clamp_min(0)
    scale = _storable((high - low) / (grid.levels - 1), dtype)
    return Scales(scale, (-low / scale).round_().clamp_(0, grid.levels - 1))


def candidate_scales(weight: Tensor, grid: IntegerGrid, dtype: torch.dtype, count: int) -> Scales:
    """Some `2 * count` grids to try on each row of `weight [rows, columns]`; the textbook one is the first."""
    plain = absmax_scales(weight, grid, dtype)
    if count <= 1:
        return Scales(plain.scale[None], plain.zero_point[None])
    shares = torch.linspace(1, _DEEPEST_CLIP[grid.bits], count, device=weight.device)[:, None]  # 1 clips nothing
    tried = _symmetric(weight, grid, shares) if grid.symmetric else _asymmetric(weight, grid, shares)
    scale = _storable(tried.scale, dtype)
    return Scales(torch.cat([plain.scale[None], scale]), torch.cat([plain.zero_point[None], tried.zero_point]))


def _symmetric(weight: Tensor, grid: IntegerGrid, shares: Tensor) -> Scales:
    # With the largest weight at the far end, -2**(bits - 1), the sign says whose end that is; the first share instead
    # puts it at the near end, where neither sign clips.
    near = torch.full_like(shares[:1], grid.middle / (grid.middle - 1))
    reach = torch.cat([near, shares]) * weight.abs().amax(1) / grid.middle
    scale = torch.cat([reach, -reach])
    return Scales(scale, torch.full_like(scale, grid.middle))


def _asymmetric(weight: Tensor, grid: IntegerGrid, shares: Tensor) -> Scales:
    low, high = weight.amin(1).clamp_max(0), weight.amax(1).clamp_min(0)
    scale = ((high - low) / (grid.levels - 1) * shares).clamp_min(torch.finfo(torch.float32).tiny)
    exact = (-low * shares / scale).clamp_(0, grid.levels - 1)
    return Scales(torch.cat([scale, scale]), torch.cat([exact.floor(), exact.ceil()]))


def round_to_nearest(
    weight: Tensor,
    grid: IntegerGrid,
    *,
    dtype: torch.dtype = torch.float32,
    candidates: int = 1,
    gram: Tensor | None = None,
    name: str = "weight",
) -> GroupedWeight:
    """Round `weight [out_features, in_features]`, group by group; zeros stay zeros.

    `dtype` is what scales are stored in: rounding happens on the stored scale, so its own error costs nothing.
    `candidates` above 1 keep the scale with the least squared error of the weights or, given the `gram
    [in_features, in_features]` of the inputs, of what the group adds to the outputs.
    Raises `CompressionError` naming the layer if a weight is not finite.
    """
    check_weight(weight, name)
    columns = grid.columns_per_group(weight.shape[1])
    chosen: list[Scales] = []
    codes: list[Tensor] = []
    for start in range(0, weight.shape[1], columns):
        part = weight[:, start : start + columns].float()
        inputs = None if gram is None else gram[start : start + columns, start : start + columns].float()
        scales = _least_squares(part, candidate_scales(part, grid, dtype, candidates), inputs, grid.levels)
        chosen.append(scales)
        codes.append(scales.codes(part.t(), grid.levels).t())
    return assemble(grid, torch.cat(codes, 1), chosen, dtype)


def assemble(
    grid: IntegerGrid, codes: Tensor, chosen: list[Scales], dtype: torch.dtype, permutation: Tensor | None = None
) -> GroupedWeight:
    """Codes and the scales of each group in turn, as they are stored."""
    zero_points = torch.stack([scales.zero_point for scales in chosen]).to(torch.uint8)
    return GroupedWeight(
        grid=grid,
        codes=codes.to(torch.uint8),
        scales=torch.stack([scales.scale for scales in chosen]).to(dtype),
        zero_points=None if grid.symmetric else zero_points,
        permutation=permutation,
    )


def check_weight(weight: Tensor, name: str) -> None:
    """Raise `CompressionError` if a weight is not finite."""
    finite = weight.isfinite()
    if not bool(finite.all()):  # counting takes eight bytes a weight, and waits until there is something to count
        bad = int((~finite).sum())
        raise CompressionError(f"{name}: {bad} of {weight.numel()} weights are NaN or infinite; check the checkpoint")


def _least_squares(part: Tensor, tried: Scales, gram: Tensor | None, levels: int) -> Scales:
    columns = part.t()
    losses = []
    for scale, zero_point in zip(tried.scale, tried.zero_point, strict=True):
        error = Scales(scale, zero_point).nearest(columns, levels) - columns
        losses.append((error * (error if gram is None else gram @ error)).sum(0))
    return tried.pick(torch.stack(losses).argmin(0))


def _storable(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """`scale` as it will be read back, in float32; 1 where it vanishes, so that an all-zero group stays all zero."""
    stored = scale.to(dtype).float()
    return torch.where(stored == 0, torch.ones_like(stored), stored)
