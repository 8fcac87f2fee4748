"""Parcels as bytes and back: MessagePack (https://msgpack.org), which can hold data and nothing that runs.

Every dataclass of the answer's vocabulary is an extension type: its code says which, its body lists the fields. An
error travels as its class's name in `serve.errors` and what it holds. Both ends are of one version of Halftone.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields
from typing import Any

import msgpack

from serve import errors
from serve.errors import HalftoneError
from serve.generation import Delta, Failure, PromptDelta, Timing, TokenLogprob
from serve.hop import Parcel

__all__ = ["ParcelReader", "pack"]

_LARGEST_PARCEL_BYTES = 256 * 2**20
"""Three times a prompt of 128 k tokens with twenty alternatives for each."""
_STRAY = "surrogatepass"
"""JSON lets a client send half of a character, as a stop string for instance; it comes back as it was."""
_TYPES: tuple[type[Any], ...] = (Parcel, PromptDelta, Delta, Failure, TokenLogprob, Timing)
_FIELDS = [tuple(field.name for field in fields(type)) for type in _TYPES]
_CODES = {type: code for code, type in enumerate(_TYPES)}
_ERROR = len(_TYPES)


def pack(parcel: Parcel) -> bytes:
    packed: bytes = msgpack.packb(parcel, default=_packed, unicode_errors=_STRAY)
    return packed


class ParcelReader:
    """Bytes in, as they come; parcels out, as they are whole. Raises ValueError at what cannot be one."""

    def __init__(self) -> None:
        self._unpacker = msgpack.Unpacker(
            ext_hook=_unpacked, use_list=False, unicode_errors=_STRAY, max_buffer_size=_LARGEST_PARCEL_BYTES
        )

    def feed(self, data: bytes) -> Iterator[Parcel]:
        self._unpacker.feed(data)
        for parcel in self._unpacker:
            if not isinstance(parcel, Parcel):
                raise ValueError(f"expected a parcel, got {type(parcel).__name__}")
            yield parcel


def _packed(value: object) -> msgpack.ExtType:
    if isinstance(value, HalftoneError):
        return msgpack.ExtType(
            _ERROR, msgpack.packb((type(value).__name__, vars(value)), default=_packed, unicode_errors=_STRAY)
        )
    code = _CODES[type(value)]
    body = [getattr(value, name) for name in _FIELDS[code]]
    return msgpack.ExtType(code, msgpack.packb(body, default=_packed, unicode_errors=_STRAY))


def _unpacked(code: int, data: bytes) -> object:
    body = msgpack.unpackb(data, ext_hook=_unpacked, use_list=False, unicode_errors=_STRAY)
    return _error(*body) if code == _ERROR else _TYPES[code](*body)


def _error(name: str, state: dict[str, Any]) -> HalftoneError:
    kind = getattr(errors, name) if name in errors.__all__ else HalftoneError
    error: HalftoneError = kind.__new__(kind)
    Exception.__init__(error, state["message"])
    error.__dict__.update(state)
    return error
