"""What loading cost and what is left: exact bytes by component, bits per weight, seconds by stage.

Counts the tensors that the model keeps, each once. Two ratios relate them to the source's parameters in 16 and in 32
bits: a model that was cut is compared with what it was cut from.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import nn

from serve.compression.formats.linear import CompressedLinear

__all__ = ["LoadReport", "ModelBytes", "measure"]


@dataclass(frozen=True)
class ModelBytes:
    """`weight_bytes`: values of every layer, norms and biases included, without embeddings. `quantization_bytes`:
    scales, zero points and tables. A head tied to the embedding is part of it; any other head is a weight.

    `projection_bits` are those of `projections` weights (decoder linear layers) with their metadata, biases excluded.
    """

    weight_bytes: int
    quantization_bytes: int
    embedding_bytes: int
    parameters: int
    projections: int
    projection_bits: int

    @property
    def total_bytes(self) -> int:
        return self.weight_bytes + self.quantization_bytes + self.embedding_bytes

    @property
    def bits_per_weight(self) -> float:
        return self.projection_bits / self.projections if self.projections else 0.0


@dataclass(frozen=True)
class LoadReport:
    """One load of one recipe. `bits_per_weight` is over the decoder's linear layers, scales and zero points included;
    `bits_per_parameter` over every parameter of the model. Sizes in bytes, times in seconds.

    `mapped_bytes` of `total_bytes` lie in the artifact's file and are not anonymous memory. `uncovered` names
    the weight matrices that the recipe left in floating point although it quantizes others, with the reason.
    """

    recipe: str
    precision: str
    weight_bytes: int
    quantization_bytes: int
    embedding_bytes: int
    total_bytes: int
    parameters: int
    bits_per_weight: float
    bits_per_parameter: float
    compression_ratio: float  # against 16 bits per parameter of the model as it was before any cut
    compression_ratio_fp32: float
    seconds: dict[str, float]
    peak_load_bytes: int
    kernels: dict[str, int]  # layers by the path that multiplies them
    device: str
    mapped_bytes: int = 0
    artifact_hit: bool = False
    calibration_tokens: int = 0
    activation_bytes: int = 0  # the most that calibration text took on its way through the model
    hessian_bytes: int = 0  # the most that Gram matrices took, with what factorizing one takes
    original_parameters: int = 0  # before any cut
    quality: dict[str, Any] = field(default_factory=dict)  # what `halftone evaluate` measured on these very weights
    uncovered: dict[str, str] = field(default_factory=dict)
    unused_keys: tuple[str, ...] = ()

    @property
    def load_s(self) -> float:
        return sum(self.seconds.values())

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "unused_keys": list(self.unused_keys), "load_s": self.load_s}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> LoadReport:
        data = {key: value for key, value in data.items() if key != "load_s"}
        return cls(**{**data, "unused_keys": tuple(data.get("unused_keys", ()))})


def measure(model: nn.Module, projections: Mapping[str, nn.Module]) -> ModelBytes:
    """Add up what `model` holds; `projections` are its decoder's linear layers by name, in whatever format they are."""
    compressed = [module for module in model.modules() if isinstance(module, CompressedLinear)]
    stored = [layer.storage() for layer in compressed]
    dense = _dense_bytes(model)
    return ModelBytes(
        weight_bytes=sum(s.weight_bytes + s.bias_bytes for s in stored) + dense["weight"],
        quantization_bytes=sum(s.metadata_bytes for s in stored),
        embedding_bytes=dense["embedding"],
        parameters=sum(_elements(layer) for layer in compressed) + dense["parameters"],
        projections=sum(_elements(layer, with_bias=False) for layer in projections.values()),
        projection_bits=8 * sum(_projection_bytes(layer) for layer in projections.values()),
    )


def _dense_bytes(model: nn.Module) -> dict[str, int]:
    """What lies in ordinary parameters, each counted once however many names it has."""
    seen: set[int] = set()
    total = {"weight": 0, "embedding": 0, "parameters": 0}
    # Embeddings first: a head tied to one of them counts as embedding.
    for module in sorted(model.modules(), key=lambda module: not isinstance(module, nn.Embedding)):
        for parameter in module.parameters(recurse=False):
            if id(parameter) not in seen:
                seen.add(id(parameter))
                total["parameters"] += parameter.numel()
                total["embedding" if isinstance(module, nn.Embedding) else "weight"] += parameter.nbytes
    return total


def _elements(layer: nn.Module, *, with_bias: bool = True) -> int:
    if isinstance(layer, CompressedLinear):
        return layer.in_features * layer.out_features + (layer.out_features if with_bias and layer.spec.has_bias else 0)
    return sum(p.numel() for name, p in layer.named_parameters() if with_bias or name == "weight")


def _projection_bytes(layer: nn.Module) -> int:
    if isinstance(layer, CompressedLinear):
        storage = layer.storage()
        return storage.weight_bytes + storage.metadata_bytes
    return sum(parameter.nbytes for name, parameter in layer.named_parameters() if name == "weight")
