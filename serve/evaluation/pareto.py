"""Which points no other beats."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["front"]


def front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the points (cost, loss) that no other undercuts in one without being worse in the other, by cost.

    Of equal points the first stands for all.
    """
    best: list[int] = []
    for index in sorted(range(len(points)), key=lambda index: (*points[index], index)):
        if not best or points[index][1] < points[best[-1]][1]:
            best.append(index)
    return best
