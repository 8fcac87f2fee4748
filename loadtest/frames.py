"""What the parent and its generator processes say to each other: pickled objects behind their length.

Only ever between a process and the child it started with the same code, never over a network.
"""

import asyncio
import pickle
from array import array
from dataclasses import dataclass, field
from typing import Any

from loadtest.settings import Load, Settings

_LENGTH_BYTES = 4


@dataclass(frozen=True, slots=True)
class Assignment:
    """Parent -> worker: the share of a load that process number `process` of `processes` sends."""

    settings: Settings
    load: Load
    process: int
    processes: int


@dataclass(frozen=True, slots=True)
class Ready:
    """Worker -> parent: everything is loaded."""


@dataclass(frozen=True, slots=True)
class Start:
    """Parent -> worker: time zero, on the machine's monotonic clock, which all processes share."""

    origin_s: float


@dataclass(frozen=True, slots=True)
class Stop:
    """Parent -> worker: send nothing more, give up what is in flight, hand it over."""


@dataclass(frozen=True, slots=True)
class Health:
    """Worker -> parent, now and then: how much it sent and how well it kept up.

    `lags_s` are delays of a timer in the worker's event loop; an arriving byte waits as long before it is
    stamped.
    """

    process: int
    sent: int
    in_flight: int
    cpu_s: float
    wall_s: float
    lags_s: "array[float]" = field(default_factory=lambda: array("d"))


@dataclass(frozen=True, slots=True)
class Finished:
    """Worker -> parent, last: how many requests it handed over, so that none can get lost unnoticed."""

    emitted: int


@dataclass(frozen=True, slots=True)
class Failed:
    """Worker -> parent: it cannot start, and why."""

    message: str


def pack(message: object) -> bytes:
    """One frame."""
    data = pickle.dumps(message, protocol=pickle.HIGHEST_PROTOCOL)
    return len(data).to_bytes(_LENGTH_BYTES) + data


async def unpack(reader: asyncio.StreamReader) -> Any:
    """The next message, or None where the other side is gone."""
    try:
        length = int.from_bytes(await reader.readexactly(_LENGTH_BYTES))
        return pickle.loads(await reader.readexactly(length))  # noqa: S301 - see the module's docstring
    except (asyncio.IncompleteReadError, ConnectionResetError):
        return None
