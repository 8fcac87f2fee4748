"""Another program's tensors, read only if they are what config.json calls for: type, size, and finite scales."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from serve.compression.checkpoints import Checkpoint
from serve.errors import CheckpointError

__all__ = ["FLOATS", "missing", "read_tensor"]

FLOATS = (torch.float16, torch.bfloat16, torch.float32)


def missing(checkpoint: Checkpoint, key: str) -> CheckpointError:
    """The error for a tensor that ought to be there."""
    return CheckpointError(f"{checkpoint.folder}: tensor {key} is missing; is the download complete?")


def read_tensor(
    checkpoint: Checkpoint, key: str, dtypes: Sequence[torch.dtype], shape: Sequence[int | None] | None = None
) -> Tensor:
    """A stored tensor of one of these types and of this shape, None standing for any size; scales must be finite."""
    if key not in checkpoint.files:
        raise missing(checkpoint, key)
    tensor = checkpoint.read(key)
    fits = shape is None or (
        tensor.dim() == len(shape) and all(want in (None, have) for want, have in zip(shape, tensor.shape, strict=True))
    )
    if tensor.dtype not in dtypes or not fits:
        size = "" if shape is None else f" {['any' if size is None else size for size in shape]}".replace("'", "")
        raise CheckpointError(
            f"{checkpoint.folder}: tensor {key} is {_type(tensor.dtype)} {list(tensor.shape)}, but config.json calls "
            f"for {' or '.join(map(_type, dtypes))}{size}; is quantization_config that of these files?"
        )
    if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
        raise CheckpointError(
            f"{checkpoint.folder}: tensor {key} holds NaN or infinite values; download or make it anew"
        )
    return tensor


def _type(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
