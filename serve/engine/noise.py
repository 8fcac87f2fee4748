"""The noise of sampling: a counter-based generator, so that a token's luck belongs to its request.

The number for choice `i` at output position `t` is a pure function of (seed, i, t). No state is carried from step to
step: batch mates, preemption and restarts cannot move it.
"""

from __future__ import annotations

__all__ = ["uniform"]

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15


def uniform(seed: int, choice_index: int, position: int) -> float:
    """A number in [0, 1) with 53 random bits."""
    state = _mix(seed & _MASK)
    state = _mix(state ^ _mix(choice_index + _GOLDEN))
    state = _mix(state ^ _mix(position + 2 * _GOLDEN))
    return (state >> 11) * 2.0**-53


def _mix(value: int) -> int:
    """SplitMix64's output function (Steele, Lea, Flood, OOPSLA 2014)."""
    value = (value + _GOLDEN) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)
