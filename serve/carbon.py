"""From joules to the CO2 of the electricity that gave them. Arithmetic; the intensity is the operator's word."""

from __future__ import annotations

from typing import Final

__all__ = ["co2_grams_per_million"]

_JOULES_PER_KWH: Final = 3.6e6


def co2_grams_per_million(joules_per_token: float | None, grams_per_kwh: float | None) -> float | None:
    """Grams of CO2 per million tokens; None where the energy was not measured or no intensity was stated."""
    if joules_per_token is None or grams_per_kwh is None:
        return None
    return 1e6 * joules_per_token / _JOULES_PER_KWH * grams_per_kwh
