"""The compiled library as Python sees it: the same structures as in `csrc/`, and one team of threads per size."""

from __future__ import annotations

import ctypes
import os
from ctypes import POINTER, c_float, c_int, c_int32, c_int64, c_void_p
from functools import cache

import torch
from torch import Tensor

from serve.kernels.build import compiled, is_compiled, missing_features

__all__ = [
    "Layer",
    "Linear",
    "Model",
    "SpanRange",
    "Step",
    "address",
    "library",
    "must_compile",
    "postpone",
    "team",
    "unavailable",
]

SWITCH = "HALFTONE_KERNELS"


class Linear(ctypes.Structure):
    """`halftone::Linear` in csrc/linear.h."""

    _fields_ = (
        ("format", c_int32),
        ("outputs", c_int32),
        ("inputs", c_int32),
        ("group", c_int32),
        ("half_scales", c_int32),
        *((name, c_void_p) for name in ("weight", "scale", "offset", "bias", "table")),
    )


class Layer(ctypes.Structure):
    """`halftone::Layer` in csrc/decoder.h."""

    _fields_ = (
        *((name, Linear) for name in ("query", "key", "value", "output", "gate", "up", "down")),
        *((n, c_void_p) for n in ("input_norm", "post_norm", "query_norm", "key_norm", "keys", "values")),
        ("window", c_int64),
    )


class Model(ctypes.Structure):
    """`halftone::Model`."""

    _fields_ = (
        *((n, c_int64) for n in ("num_layers", "hidden", "heads", "kv_heads", "head_dim", "intermediate")),
        ("block_size", c_int64),
        ("head_stride", c_int64),
        ("epsilon", c_float),
        ("scaling", c_float),
        ("layers", c_void_p),
        ("embedding", c_void_p),
        ("final_norm", c_void_p),
        ("head", Linear),
        ("cosines", c_void_p),
        ("sines", c_void_p),
    )


class SpanRange(ctypes.Structure):
    """`halftone::Span`."""

    _fields_ = (
        *((name, c_int64) for name in ("first_row", "num_rows", "first_position", "num_blocks")),
        ("blocks", c_void_p),
    )


class Step(ctypes.Structure):
    """`halftone::Step`."""

    _fields_ = (
        *((name, c_int64) for name in ("num_rows", "num_spans", "num_logits")),
        *((n, c_void_p) for n in ("token_ids", "positions", "logit_rows", "spans", "logits", "best")),
        ("num_hidden", c_int64),
        *((n, c_void_p) for n in ("hidden_rows", "hidden")),
    )


_SIGNATURES = {
    "ht_supported": ([], c_int),
    "ht_team": ([c_int], c_void_p),
    "ht_packed_bytes": ([POINTER(Linear)], c_int64),
    "ht_pack": ([c_void_p, POINTER(Linear), c_void_p, c_void_p], None),
    "ht_unpack": ([POINTER(Linear), c_void_p], None),
    "ht_pack_codes": ([c_void_p, POINTER(Linear), c_void_p, c_int, c_int, c_void_p], None),
    "ht_linear": ([c_void_p, POINTER(Linear), c_void_p, c_int64, c_void_p], None),
    "ht_decoder": ([c_void_p, POINTER(Model)], c_void_p),
    "ht_decoder_free": ([c_void_p], None),
    "ht_decode": ([c_void_p, POINTER(Step)], None),
    "ht_project": ([c_void_p, c_void_p, c_int64, c_void_p], None),
}


@cache
def _loaded() -> ctypes.CDLL | str:
    if reason := _reason_against():
        return reason
    path = compiled()
    if isinstance(path, str):
        return path
    loaded = ctypes.CDLL(str(path))
    for name, (arguments, result) in _SIGNATURES.items():
        function = getattr(loaded, name)
        function.argtypes, function.restype = arguments, result
    return loaded if loaded.ht_supported() else "the operating system does not grant the tile registers"


def _reason_against() -> str | None:
    if os.environ.get(SWITCH, "").lower() in ("0", "off"):
        return f"switched off by {SWITCH}"
    missing = missing_features()
    return f"this CPU has no {', '.join(missing)}" if missing else None


_postponed: str | None = None


def must_compile() -> bool:
    """Whether the first call of `unavailable` would compile."""
    return not _loaded.cache_info().currsize and _reason_against() is None and not is_compiled()


def postpone(reason: str | None) -> None:
    """Do as if there were no kernels, for that reason; None: no longer."""
    global _postponed
    _postponed = reason


def unavailable() -> str | None:
    """Why there are no kernels on this machine, in one line; None where there are. The first call may compile."""
    if _postponed is not None:
        return _postponed
    loaded = _loaded()
    return loaded if isinstance(loaded, str) else None


def library() -> ctypes.CDLL:
    """The functions; ask `unavailable` first."""
    loaded = _loaded()
    assert not isinstance(loaded, str), loaded
    return loaded


@cache
def team(threads: int) -> int:
    """The team of that many threads. It lives as long as the process and sleeps when it has nothing to do."""
    return int(library().ht_team(threads))


def address(tensor: Tensor | None, dtype: torch.dtype | None = None) -> int | None:
    """Where a contiguous CPU tensor's numbers lie."""
    if tensor is None:
        return None
    assert tensor.is_contiguous()
    assert tensor.device.type == "cpu"
    assert dtype in (None, tensor.dtype)
    return tensor.data_ptr()
