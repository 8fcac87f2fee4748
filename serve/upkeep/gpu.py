"""One NVIDIA GPU as its driver sees it (NVML): the energy it took, who worked on it, what a process holds of it.

NVML counts a whole GPU. Where several processes share one, the driver's sampled utilization says who worked how much;
in a container that hides process numbers it cannot, and then nothing is claimed.

Needs the package `nvidia-ml-py` (the extra `nvidia`) beside the driver.
"""

from __future__ import annotations

import os
from typing import Any

from serve.errors import Unmeasurable

__all__ = ["Gpu"]


class Gpu:
    """`nvml`: the module `pynvml`, begun; `handle`: one of its devices."""

    def __init__(self, nvml: Any, handle: Any, name: str, pid: int | None = None) -> None:
        self._nvml = nvml
        self._handle = handle
        self._pid = os.getpid() if pid is None else pid
        self._seen_us = 0
        self.name = f"NVML {name}"
        self._last_mj = self._energy_mj()

    @classmethod
    def of(cls, device: str) -> Gpu:
        """The GPU that torch calls `device`. Raises Unmeasurable, with the remedy."""
        try:
            import pynvml
        except ImportError:
            raise Unmeasurable("the package nvidia-ml-py is missing: pip install 'halftone[nvidia]'") from None
        import torch

        properties = torch.cuda.get_device_properties(device)
        try:
            pynvml.nvmlInit()
            handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{properties.uuid}")
        except pynvml.NVMLError as error:
            raise Unmeasurable(f"NVML does not know {device}: {error}") from None
        return cls(pynvml, handle, properties.name)

    def take_joules(self) -> float:
        """This process's part of what the GPU took since it was last asked. Raises Unmeasurable."""
        before_mj, self._last_mj = self._last_mj, self._energy_mj()
        return self._share() * max(0, self._last_mj - before_mj) / 1000.0

    def held_bytes(self) -> int | None:
        """What this process holds of the GPU, context included; None where the driver does not say."""
        for process in self._processes():
            if process.pid == self._pid and process.usedGpuMemory is not None:
                return int(process.usedGpuMemory)
        return None

    def _energy_mj(self) -> int:
        try:
            return int(self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle))
        except self._nvml.NVMLError as error:
            raise Unmeasurable(f"{self.name} does not count its energy: {error}") from None

    def _share(self) -> float:
        present = {process.pid for process in self._processes()}
        if len(present) <= 1:
            return 1.0
        if self._pid not in present:
            raise Unmeasurable(f"{self.name} is shared, and the driver does not say which of its processes this one is")
        samples = self._worked()
        whole = sum(sample.smUtil for sample in samples)
        return sum(sample.smUtil for sample in samples if sample.pid == self._pid) / whole if whole else 0.0

    def _processes(self) -> list[Any]:
        try:
            return list(self._nvml.nvmlDeviceGetComputeRunningProcesses(self._handle))
        except self._nvml.NVMLError:
            return []

    def _worked(self) -> list[Any]:
        """Samples that were not seen before; NVML calls it an error where nobody worked."""
        try:
            samples = list(self._nvml.nvmlDeviceGetProcessUtilization(self._handle, self._seen_us))
        except self._nvml.NVMLError:
            return []
        self._seen_us = max([self._seen_us, *(sample.timeStamp for sample in samples)])
        return samples
