"""What is asked: a device, its memory, and how good the model must stay. And what is usually tried there."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from serve.errors import ConfigError

__all__ = ["DEVICES", "Device", "DeviceName", "Target", "parse_bytes"]

DeviceName = Literal["cuda", "cpu", "edge", "phone"]
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


@dataclass(frozen=True)
class Device:
    """`wants` is what decides among recipes that fit and are good enough. `rule` is what people expect before anything
    is measured: how a recipe's name begins.

    On a `server` many sequences decode together and our engine's process counts; elsewhere another program runs the
    model, one sequence at a time.
    """

    title: str
    recipes: tuple[str, ...]
    wants: Literal["speed", "size"]
    rule: tuple[str, ...]
    server: bool


DEVICES: dict[DeviceName, Device] = {
    "cuda": Device(
        "server GPU", ("fp16", "bf16", "int8", "int8-weight", "fp8", "nf4", "gptq4-g64"), "speed",
        ("fp16", "bf16", "int8", "fp8"), True,
    ),
    "cpu": Device("server CPU", ("bf16", "int8", "int8-weight", "nf4", "gptq4-g64"), "speed", ("int8",), True),
    "edge": Device(
        "edge device", ("int8", "gptq4-g64", "gptq4-g32-asym", "awq4-g64", "mixed4.5", "nf4", "gptq3-g64",
                        "structured25+gptq4-g64"),
        "size", ("gptq4", "awq4", "rtn4", "nf4", "mixed4"), False,
    ),
    "phone": Device(
        "phone", ("rtn8-g32", "rtn4-g32", "gptq4-g32", "gptq4-g64", "gptq3-g64", "structured25+gptq4-g32"), "size",
        ("gptq4", "awq4", "rtn4", "nf4", "mixed4"), False,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Target:
    """`floor_ratio`: the least share of the reference's next-token accuracy to keep; `max_kl` in nats vetoes too.

    `sequences` of full context must fit beside the model.
    """

    device: DeviceName
    memory_bytes: int
    floor_ratio: float = 0.97
    max_kl: float | None = None
    sequences: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.floor_ratio <= 1:
            raise ConfigError("floor", f"{self.floor_ratio:g} is not a share between 0 and 1, as 0.97")
        if self.device not in DEVICES:
            raise ConfigError("device", f"{self.device!r} is not one of {', '.join(DEVICES)}")

    @property
    def traits(self) -> Device:
        return DEVICES[self.device]


def parse_bytes(text: str) -> int:
    """8GiB, 8GB, 512MiB, 4g or plain bytes."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]i?)?b?\s*", text.lower())
    if match is None or float(match[1]) <= 0:
        raise ConfigError("memory", f"{text!r} is not a size, as 8GiB or 512MB")
    return int(float(match[1]) * _UNITS[match[2] or ""])
