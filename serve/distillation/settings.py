"""How long, how fast and by what a student learns, as plain data. Knows no torch."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from serve.errors import ConfigError

__all__ = ["Settings"]

_RATE_TIMES_WIDTH = 0.4


@dataclass(frozen=True)
class Settings:
    """`learning_rate` None suits the model's width: 0.4 / hidden size, for wide models want small steps.

    A step learns from `batch_size` windows of at most `window_tokens`. The loss of a token is `soft_weight` times the
    divergence from the teacher at `temperature`, plus `hard_weight` times that from the text itself.
    Without `anneal` the rate stays where it is: more is to be removed after these lessons.
    """

    steps: int = 300
    batch_size: int = 8
    window_tokens: int = 256
    learning_rate: float | None = None
    warmup_steps: int = 20
    weight_decay: float = 0.01
    temperature: float = 2.0
    soft_weight: float = 0.7
    hard_weight: float = 0.3
    seed: int = 0
    anneal: bool = True

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "window_tokens"):
            least = 2 if name == "window_tokens" else 1
            if getattr(self, name) < least:
                raise ConfigError(name, f"must be at least {least}, not {getattr(self, name)}")
        if self.temperature <= 0 or (self.learning_rate is not None and self.learning_rate <= 0):
            raise ConfigError("temperature" if self.temperature <= 0 else "learning_rate", "must be above 0")
        if min(self.soft_weight, self.hard_weight) < 0 or self.soft_weight + self.hard_weight == 0:
            raise ConfigError("soft_weight", "the weights must not be negative, nor both 0")

    def learning_rate_at(self, step: int, hidden_size: int) -> float:
        """Rises over the first steps, then falls in a line to zero where the lessons `anneal`."""
        highest = self.learning_rate or _RATE_TIMES_WIDTH / hidden_size
        warmup = min(self.warmup_steps, max(self.steps // 4, 1))
        falling = (self.steps - step) / max(self.steps - warmup, 1) if self.anneal else 1.0
        return highest * min(1.0, (step + 1) / warmup, falling)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)
