"""How weights are stored and multiplied: one small module per format, kernel and reference together."""

from serve.compression.formats.linear import CompressedLinear, LinearSpec, Storage

__all__ = ["CompressedLinear", "LinearSpec", "Storage"]
