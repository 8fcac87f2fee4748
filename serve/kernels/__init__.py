"""Products and a whole decoder step in C++, for CPUs with AVX-512 (BF16, VNNI) or Intel AMX; optional.

Knows tensors and number formats, neither recipes nor models nor requests. Where there is no such CPU or no compiler,
`unavailable()` says why, and everything else in Halftone runs on its plain path.
"""

from serve.kernels.background import BEING_BUILT, Build, build_aside
from serve.kernels.decoder import Decoder, DecoderShape, LayerWeights, Span
from serve.kernels.library import unavailable
from serve.kernels.linear import PackedLinear
from serve.kernels.memory import release

__all__ = [
    "BEING_BUILT",
    "Build",
    "Decoder",
    "DecoderShape",
    "LayerWeights",
    "PackedLinear",
    "Span",
    "build_aside",
    "release",
    "unavailable",
]
