"""What a bench is asked and what it answers, as plain data: it crosses processes and is printed as it is."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from serve.errors import ConfigError

__all__ = ["Bench", "BenchSettings", "Phase", "Speed"]

Phase = Literal["prefill", "decode"]


@dataclass(frozen=True)
class BenchSettings:
    """Each figure is the median of `repeats` runs after one that is not counted.

    `threads` None leaves torch's own choice. Prompts are random token ids, so that no prefix is ever shared.
    """

    prompt_tokens: int = 128
    decode_tokens: int = 64
    batch_sizes: tuple[int, ...] = (1, 8, 16)
    repeats: int = 5
    threads: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("prompt_tokens", "decode_tokens", "repeats"):
            if getattr(self, name) < 1:
                raise ConfigError(name, f"must be at least 1, not {getattr(self, name)}")
        if not self.batch_sizes or min(self.batch_sizes) < 1:
            raise ConfigError("batch_sizes", "must name one or more sizes of at least 1")

    @property
    def tokens(self) -> int:
        """Of one sequence, output included."""
        return self.prompt_tokens + self.decode_tokens


@dataclass(frozen=True)
class Speed:
    """Median tokens per second over all sequences together, and the runs it is the median of."""

    phase: Phase
    batch_size: int
    tokens_per_s: float
    runs_tokens_per_s: tuple[float, ...] = ()


@dataclass(frozen=True)
class Bench:
    """One recipe's engine in a process that did nothing else.

    `total_bytes` is the model's (weights, quantization and embedding bytes); `resident_bytes` is the whole process with
    torch and Python after the runs, `peak_bytes` its highest. `load_s` ends with the model in memory, `ready_s` with
    its first token; imports count in neither. On a GPU `device_peak_bytes` is what torch allocated there at most.
    """

    recipe: str
    precision: str
    device: str
    threads: int
    path: str
    artifact_hit: bool
    load_s: float
    ready_s: float
    total_bytes: int
    weight_bytes: int
    quantization_bytes: int
    embedding_bytes: int
    bits_per_weight: float
    compression_ratio: float
    kernels: dict[str, int]
    kv_cache_bytes: int
    peak_load_bytes: int
    resident_bytes: int
    peak_bytes: int
    device_peak_bytes: int
    speed: tuple[Speed, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain data for `--json`; the model's size is `bytes`, as in `evaluate`."""
        data = asdict(self)
        return {("bytes" if f.name == "total_bytes" else f.name): data[f.name] for f in fields(self)}

    def tokens_per_s(self, phase: Phase, batch_size: int) -> float | None:
        """None where that was not measured."""
        found = (s.tokens_per_s for s in self.speed if (s.phase, s.batch_size) == (phase, batch_size))
        return next(found, None)
