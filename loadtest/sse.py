"""Server-sent events, as the HTML standard defines them (section 9.2.6), over bytes that have all arrived.

A line ends with LF, CRLF or CR; a blank line ends an event; `data:` lines of one event are joined. The
standard says to ignore what is neither field nor comment. A measurement must not ignore it, so such lines are
counted.
"""

import re
from dataclasses import dataclass

_LINE = re.compile(rb"([^\r\n]*)(\r\n|\n|\r|\Z)")
_FIELDS = (b"event", b"id", b"retry", b"data")


@dataclass(frozen=True, slots=True)
class Event:
    """The data of one event, and the offset in the stream of the first byte after it."""

    data: bytes
    end: int


@dataclass(frozen=True, slots=True)
class Stream:
    """`events`; the `tail` of an event that its blank line never ended; how many lines were no field at all."""

    events: list[Event]
    tail: bytes
    stray_lines: int


def split(body: bytes | bytearray) -> Stream:
    """All events of `body`, however it was cut while it travelled."""
    events: list[Event] = []
    data: list[bytes] = []
    stray_lines = 0
    for match in _LINE.finditer(body):
        line, ending = match.groups()
        if line.startswith(b"data:"):
            data.append(line[5:].removeprefix(b" "))
        elif line:
            stray_lines += not line.startswith(b":") and line.partition(b":")[0] not in _FIELDS
        elif data and ending:
            events.append(Event(b"\n".join(data), match.end()))
            data = []
    return Stream(events, b"\n".join(data), stray_lines)
