"""Both meters of one replica, and when they are read: counters every time, pages now and then."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Protocol

from serve.upkeep.energy import Energy, EnergyMeter
from serve.upkeep.memory import Engaged, MemoryAccount, resident_checkpoint_bytes

__all__ = ["Upkeep"]

_WALK_S = 10.0
"""Where pages really are costs a walk over them: milliseconds per gigabyte."""


class Stats(Protocol):
    """What is asked of `serve.engine.EngineStats`."""

    @property
    def steps(self) -> int: ...
    @property
    def generation_tokens(self) -> int: ...
    @property
    def kv_blocks_used(self) -> int: ...
    @property
    def kv_blocks_total(self) -> int: ...
    @property
    def kv_cache_bytes(self) -> int: ...


class Working(Protocol):
    """What is asked of `serve.engine.Engine`."""

    def stats(self) -> Stats: ...

    def kv_cache_resident_bytes(self) -> int: ...


class Upkeep:
    """Made before the model is loaded; `begin` once it is, or once another engine took its place, then `look` about
    once a second. They read files and ask drivers: not for an event loop."""

    def __init__(self, device: str) -> None:
        self._device = device
        self._account = MemoryAccount(device)
        self._walked_s = float("-inf")
        self._kv_cache_resident = 0
        self._unread = 0
        self.memory: Mapping[str, int] = {}
        """Bytes by component, as of the last look."""

    def begin(self, engine: Working, *, weights: int, quantization: int, mapped: int) -> None:
        """weights, quantization: bytes that the model holds; mapped: how many of the weights' lie in a file."""
        self._engine, self._walked_s = engine, float("-inf")
        self._weights, self._quantization, self._mapped = weights, quantization, mapped
        self._account.stand(engine.kv_cache_resident_bytes())
        self._meter = EnergyMeter.of(self._device)
        self.look()

    def look(self) -> None:
        stats = self._engine.stats()
        self._meter.take(steps=stats.steps, tokens=stats.generation_tokens)
        if (now_s := time.monotonic()) >= self._walked_s + _WALK_S:
            self._walked_s = now_s
            self._kv_cache_resident = self._engine.kv_cache_resident_bytes()
            self._unread = max(0, self._mapped - resident_checkpoint_bytes()) if self._mapped else 0
        used_ratio = stats.kv_blocks_used / max(1, stats.kv_blocks_total)
        engaged = Engaged(
            weights=self._weights,
            quantization=self._quantization,
            unread=self._unread,
            kv_cache=stats.kv_cache_bytes,
            kv_cache_used=round(stats.kv_cache_bytes * used_ratio),
            kv_cache_resident=self._kv_cache_resident,
        )
        self.memory = self._account.components(engaged)

    @property
    def energy(self) -> Energy:
        """Since `begin`."""
        return self._meter.energy
