"""How long a variant had at least one request open: the length of a union of intervals that come in any order."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from dataclasses import dataclass, field
from typing import Any, Final

__all__ = ["Busy"]

_KEPT: Final = 512


@dataclass
class Busy:
    """`spans` are apart and in order; the oldest are only counted. What comes later than that counts from there on."""

    before_s: float = 0.0
    since_s: float = float("-inf")
    spans: list[list[float]] = field(default_factory=list)

    @property
    def total_s(self) -> float:
        return self.before_s + sum(end - start for start, end in self.spans)

    def add(self, start_s: float, end_s: float) -> None:
        start_s = max(start_s, self.since_s)
        if end_s <= start_s:
            return
        first = bisect_left(self.spans, start_s, key=lambda span: span[1])
        last = bisect_right(self.spans, end_s, key=lambda span: span[0])
        for span in self.spans[first:last]:
            start_s, end_s = min(start_s, span[0]), max(end_s, span[1])
        self.spans[first:last] = [[start_s, end_s]]
        if len(self.spans) > _KEPT:
            oldest = self.spans.pop(0)
            self.before_s, self.since_s = self.before_s + oldest[1] - oldest[0], oldest[1]

    def to_dict(self) -> dict[str, Any]:
        since_s = None if self.since_s == float("-inf") else self.since_s  # JSON has no infinity
        return {"before_s": self.before_s, "since_s": since_s, "spans": self.spans}

    @classmethod
    def from_dict(cls, mapping: dict[str, Any]) -> Busy:
        since_s = mapping["since_s"]
        return cls(mapping["before_s"], float("-inf") if since_s is None else since_s, mapping["spans"])
