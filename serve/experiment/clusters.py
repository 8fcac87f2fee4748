"""Sums that remember which user and which stretch of time they came from, in bounded memory.

Requests are not independent: a user's requests resemble one another, and so do those that stood in one queue. So
nothing here is ever averaged over requests alone. Every sum is kept twice more, by **groups of users** (a user is
hashed into one of `USER_GROUPS`; a coarser cluster is still a valid one) and by **blocks of time**. From these any
ratio of sums, and any share of values below a point, gets a variance that is honest about both (`intervals`).

Blocks would grow without bound; when there are `MOST_BLOCKS` of them, neighbours are joined and the width doubles
(dynamic batch means, Yeh & Schmeiser 2000). Longer blocks depend on one another less, so nothing is lost by it.

Values are counted in buckets of a sixteenth of an octave (4.4 %), and read between their edges along a line.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from math import floor, log2
from typing import Any, Final

__all__ = ["MOST_BLOCKS", "USER_GROUPS", "Place", "Ratio", "Values", "bucket_edge_s"]

USER_GROUPS: Final = 64
MOST_BLOCKS: Final = 64
_PER_OCTAVE: Final = 16
_LEAST: Final = 1e-6
_MOST: Final = 1e6

Place = tuple[int, int]
"""(group of users, block of time) that a request belongs to."""


@dataclass
class Ratio:
    """The sum of `y` over the sum of `x`: of latencies over requests, of nats over tokens, of failures over requests.

    `squares` are the sums of y², x·y and x² over single requests, as if they were independent.
    """

    y: float = 0.0
    x: float = 0.0
    n: int = 0
    squares: list[float] = field(default_factory=lambda: [0.0, 0.0, 0.0])
    users: dict[int, list[float]] = field(default_factory=dict)  # group -> [y, x]
    blocks: dict[int, list[float]] = field(default_factory=dict)  # block -> [y, x]

    @property
    def value(self) -> float:
        return self.y / self.x if self.x else 0.0

    def add(self, place: Place, y: float, x: float = 1.0) -> None:
        self.y, self.x, self.n = self.y + y, self.x + x, self.n + 1
        for index, square in enumerate((y * y, x * y, x * x)):
            self.squares[index] += square
        for clusters, key in ((self.users, place[0]), (self.blocks, place[1])):
            cluster = clusters.setdefault(key, [0.0, 0.0])
            cluster[0], cluster[1] = cluster[0] + y, cluster[1] + x

    def join_blocks(self) -> None:
        """Blocks 2k and 2k + 1 become block k."""
        joined: dict[int, list[float]] = {}
        for block, (y, x) in self.blocks.items():
            cluster = joined.setdefault(block // 2, [0.0, 0.0])
            cluster[0], cluster[1] = cluster[0] + y, cluster[1] + x
        self.blocks = joined

    def plus(self, other: Ratio) -> Ratio:
        """Both together."""
        squares = [a + b for a, b in zip(self.squares, other.squares, strict=True)]
        users, blocks = _added(self.users, other.users), _added(self.blocks, other.blocks)
        return Ratio(self.y + other.y, self.x + other.x, self.n + other.n, squares, users, blocks)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, mapping: Mapping[str, Any]) -> Ratio:
        by_number = {key: {int(k): v for k, v in mapping[key].items()} for key in ("users", "blocks")}
        return cls(**{**mapping, **by_number})


Counts = dict[int, int]
"""How many values fell into each bucket."""


@dataclass
class Values:
    """Positive values of one kind: their mean through `mean`, and their distribution, whole and by cluster."""

    mean: Ratio = field(default_factory=Ratio)
    counts: Counts = field(default_factory=dict)
    users: dict[int, Counts] = field(default_factory=dict)
    blocks: dict[int, Counts] = field(default_factory=dict)

    @property
    def n(self) -> int:
        return self.mean.n

    def add(self, place: Place, value: float) -> None:
        self.mean.add(place, value)
        bucket = _bucket(value)
        by_user, by_block = self.users.setdefault(place[0], {}), self.blocks.setdefault(place[1], {})
        for counts in (self.counts, by_user, by_block):
            counts[bucket] = counts.get(bucket, 0) + 1

    def below(self, value: float) -> Ratio:
        """The share of values below `value`, as a ratio of counts."""
        whole = _below(self.counts, value)
        return Ratio(
            whole,
            float(self.n),
            self.n,
            [whole, whole, float(self.n)],
            {key: [_below(counts, value), float(sum(counts.values()))] for key, counts in self.users.items()},
            {key: [_below(counts, value), float(sum(counts.values()))] for key, counts in self.blocks.items()},
        )

    def join_blocks(self) -> None:
        self.mean.join_blocks()
        joined: dict[int, Counts] = {}
        for block, counts in self.blocks.items():
            _count_into(joined.setdefault(block // 2, {}), counts)
        self.blocks = joined

    def plus(self, other: Values) -> Values:
        """Both together."""
        both = Values(self.mean.plus(other.mean))
        for one in (self, other):
            _count_into(both.counts, one.counts)
            for mine, theirs in ((both.users, one.users), (both.blocks, one.blocks)):
                for key, counts in theirs.items():
                    _count_into(mine.setdefault(key, {}), counts)
        return both

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, mapping: Mapping[str, Any]) -> Values:
        users, blocks = (
            {int(key): _numbered(counts) for key, counts in mapping[name].items()} for name in ("users", "blocks")
        )
        return cls(Ratio.from_dict(mapping["mean"]), _numbered(mapping["counts"]), users, blocks)


def bucket_edge_s(bucket: int) -> float:
    """The lower edge of a bucket."""
    return float(2.0 ** (bucket / _PER_OCTAVE))


def _position(value: float) -> float:
    """A value on the scale of buckets."""
    return log2(min(max(value, _LEAST), _MOST)) * _PER_OCTAVE


def _bucket(value: float) -> int:
    return floor(_position(value))


def _below(counts: Counts, value: float) -> float:
    position = _position(value)
    edge = floor(position)
    return sum(count for bucket, count in counts.items() if bucket < edge) + counts.get(edge, 0) * (position - edge)


def _count_into(counts: Counts, more: Counts) -> None:
    for bucket, count in more.items():
        counts[bucket] = counts.get(bucket, 0) + count


def _added(one: dict[int, list[float]], other: dict[int, list[float]]) -> dict[int, list[float]]:
    total = {key: list(pair) for key, pair in one.items()}
    for key, (y, x) in other.items():
        cluster = total.setdefault(key, [0.0, 0.0])
        cluster[0], cluster[1] = cluster[0] + y, cluster[1] + x
    return total


def _numbered(counts: Mapping[str, int]) -> Counts:
    return {int(bucket): count for bucket, count in counts.items()}
