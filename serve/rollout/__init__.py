"""Who gets which variant, and how evidence moves it. Pure: no clock, no network, no Ray, no torch."""

from serve.rollout.outcome import Batch, Drift, Outcome
from serve.rollout.split import Assignment, Route, Split, assign, shadows, unit_hash

__all__ = ["Assignment", "Batch", "Drift", "Outcome", "Route", "Split", "assign", "shadows", "unit_hash"]
