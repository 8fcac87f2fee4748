"""What the engine counts. Facts only: the shell around it turns them into metrics."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Counters", "EngineStats"]


@dataclass(slots=True)
class Counters:
    """Totals since the start; they only grow."""

    steps: int = 0
    preemptions: int = 0
    prompt_tokens: int = 0
    generation_tokens: int = 0
    prefix_cache_queries: int = 0
    prefix_cache_hits: int = 0


@dataclass(frozen=True, slots=True)
class EngineStats:
    """Facts at one moment, the counters among them."""

    running: int
    waiting: int
    kv_blocks_used: int
    kv_blocks_total: int
    kv_cache_bytes: int
    steps: int
    preemptions: int
    prompt_tokens: int
    generation_tokens: int
    prefix_cache_queries: int
    prefix_cache_hits: int
