"""Joules are those that the counters say, divided as it is told, and never invented."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from serve.errors import Unmeasurable
from serve.upkeep.energy import EnergyMeter, Processor
from serve.upkeep.gpu import Gpu
from serve.upkeep.rapl import POWERCAP, Rapl
from tests.upkeep.powercap import RANGE_UJ, Powercap


@pytest.fixture
def powercap(tmp_path: Path) -> Powercap:
    return Powercap(tmp_path / "powercap")


@pytest.fixture
def root(powercap: Powercap, tmp_path: Path) -> Path:
    return tmp_path / "powercap"


def test_packages_and_their_memory_count_once_and_neither_their_parts_nor_the_board(
    powercap: Powercap, root: Path
) -> None:
    rapl = Rapl(root)
    for zone, joules in (("0", 10.0), ("0:0", 7.0), ("0:1", 2.0), ("1", 4.0), ("2", 100.0)):
        powercap.add(zone, joules)
    assert rapl.take_joules() == pytest.approx(16.0)
    assert rapl.take_joules() == 0.0
    assert rapl.name == "RAPL package-0, dram, package-1"


def test_a_counter_that_begins_anew_loses_nothing(powercap: Powercap, root: Path) -> None:
    powercap.set("0", RANGE_UJ - 3_000_000)
    rapl = Rapl(root)
    powercap.add("0", 5.0)
    assert rapl.take_joules() == pytest.approx(5.0)


def test_the_same_counters_by_two_ways_are_read_once(powercap: Powercap, root: Path) -> None:
    Powercap(root, "intel-rapl-mmio").add("0", 50.0)
    rapl = Rapl(root)
    powercap.add("0", 5.0)
    assert rapl.take_joules() == pytest.approx(5.0)


def test_what_cannot_be_read_is_unavailable_with_the_remedy(
    powercap: Powercap, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(Unmeasurable, match="is missing, as in most virtual machines"):
        Rapl(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(Unmeasurable, match="knows no processor package"):
        Rapl(tmp_path / "empty")
    powercap.file("0:1").write_text("n/a")
    with pytest.raises(Unmeasurable, match="holds 'n/a' where microjoules"):
        Rapl(root)
    closed, read = powercap.file("0"), Path.read_text

    def refuse(file: Path, *arguments: Any, **options: Any) -> str:  # root may read everything
        if file == closed:
            raise PermissionError(13, "Permission denied")
        return read(file, *arguments, **options)

    monkeypatch.setattr(Path, "read_text", refuse)
    meter = EnergyMeter.of("cpu", root)
    assert meter.energy.joules is None
    assert meter.energy.told == f"unavailable: {closed} may not be read: root has to allow it, as by chmod a+r"


def test_a_process_gets_the_part_of_the_package_that_its_processor_time_is(powercap: Powercap, root: Path) -> None:
    times = iter([(10.0, 100.0), (11.0, 104.0), (11.0, 104.0), (13.0, 106.0)])
    processor = Processor(Rapl(root), lambda: next(times))
    powercap.add("0", 40.0)
    assert processor.take_joules() == pytest.approx(10.0)  # 1 s of the machine's 4
    powercap.add("0", 7.0)
    assert processor.take_joules() == 0.0  # nobody computed
    powercap.add("0", 6.0)
    assert processor.take_joules() == pytest.approx(6.0)


def test_the_parts_of_all_processes_add_up_to_the_counter(powercap: Powercap, root: Path) -> None:
    shares = (1.5, 0.5, 2.0)
    times = [iter([(0.0, 0.0), (mine, sum(shares))]) for mine in shares]
    processors = [Processor(Rapl(root), lambda own=own: next(own)) for own in times]  # type: ignore[misc]
    powercap.add("0", 33.0)
    assert sum(processor.take_joules() for processor in processors) == pytest.approx(33.0)


class Counted:
    """A source that says what it is told to."""

    name = "counter"

    def __init__(self, *joules: float) -> None:
        self._joules = list(joules)

    def take_joules(self) -> float:
        if not self._joules:
            raise Unmeasurable("it was unplugged")
        return self._joules.pop(0)


def test_only_seconds_in_which_the_engine_worked_are_counted() -> None:
    meter = EnergyMeter([Counted(100.0, 5.0, 50.0, 7.0)])
    assert meter.energy.joules == 0.0
    for steps, tokens in ((3, 10), (8, 40), (8, 40), (9, 41)):  # the first look is where it begins
        meter.take(steps=steps, tokens=tokens)
    assert (meter.energy.joules, meter.energy.tokens, meter.energy.told) == (12.0, 31, "counter")


def test_a_counter_that_goes_away_is_unavailable_from_then_on() -> None:
    meter = EnergyMeter([Counted(1.0, 5.0)])
    for steps in (1, 2, 3):
        meter.take(steps=steps, tokens=steps)
    assert meter.energy.joules is None
    assert meter.energy.told == "unavailable: it was unplugged"


def test_this_machine_measures_or_says_plainly_that_it_cannot() -> None:
    energy = EnergyMeter.of("cpu").energy
    if energy.joules is None:
        assert energy.told.startswith("unavailable: ")
        assert len(energy.told) > len("unavailable: ")
    else:
        assert energy.told.startswith("RAPL package-")
    assert POWERCAP.is_dir() or energy.told == (
        f"unavailable: this machine has no energy counters: {POWERCAP} is missing, as in most virtual machines"
    )


class Nvml:
    """The few functions of `pynvml` that are asked. `processes`: held bytes by process; `worked`: utilization."""

    class NVMLError(Exception):
        pass

    def __init__(self) -> None:
        self.energy_mj: int | None = 1_000_000
        self.processes: dict[int, int | None] = {7: 3_000_000_000}
        self.worked: list[tuple[int, int, int]] = []

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: object) -> int:
        if self.energy_mj is None:
            raise self.NVMLError("Not Supported")
        return self.energy_mj

    def nvmlDeviceGetComputeRunningProcesses(self, handle: object) -> list[Any]:
        return [SimpleNamespace(pid=pid, usedGpuMemory=held) for pid, held in self.processes.items()]

    def nvmlDeviceGetProcessUtilization(self, handle: object, since_us: int) -> list[Any]:
        found = [sample for sample in self.worked if sample[2] > since_us]
        if not found:
            raise self.NVMLError("Not Found")
        return [SimpleNamespace(pid=pid, smUtil=percent, timeStamp=at_us) for pid, percent, at_us in found]


def test_a_gpu_of_ones_own_is_counted_whole() -> None:
    nvml = Nvml()
    gpu = Gpu(nvml, None, "H100", pid=7)
    nvml.energy_mj = 1_450_000
    assert gpu.take_joules() == pytest.approx(450.0)
    assert (gpu.held_bytes(), gpu.name) == (3_000_000_000, "NVML H100")
    nvml.processes = {7: None}
    assert gpu.held_bytes() is None


def test_a_gpu_that_is_shared_is_divided_by_who_worked() -> None:
    nvml = Nvml()
    nvml.processes[8] = 1
    gpu = Gpu(nvml, None, "H100", pid=7)
    nvml.energy_mj, nvml.worked = 1_100_000, [(7, 60, 1), (8, 20, 1)]
    assert gpu.take_joules() == pytest.approx(75.0)
    nvml.energy_mj = 1_200_000
    assert gpu.take_joules() == 0.0  # nothing new: nobody worked
    nvml.energy_mj, nvml.worked = 1_300_000, [(8, 50, 2)]
    assert gpu.take_joules() == 0.0


def test_a_gpu_that_cannot_be_divided_or_does_not_count_is_unavailable() -> None:
    nvml = Nvml()
    nvml.processes = {100: 1, 101: 1}  # as seen from a container with process numbers of its own
    gpu = Gpu(nvml, None, "H100", pid=7)
    nvml.energy_mj, nvml.worked = 2_000_000, [(100, 50, 1)]
    with pytest.raises(Unmeasurable, match="does not say which"):
        gpu.take_joules()
    nvml.energy_mj = None
    with pytest.raises(Unmeasurable, match="does not count its energy"):
        Gpu(nvml, None, "T4", pid=7)


def test_a_variant_on_a_gpu_is_not_measured_by_its_processor_alone(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(device: str) -> Gpu:
        raise Unmeasurable("the package nvidia-ml-py is missing")

    monkeypatch.setattr(Gpu, "of", missing)
    assert EnergyMeter.of("cuda", root).energy.told == "unavailable: the package nvidia-ml-py is missing"
    monkeypatch.setattr(Gpu, "of", lambda device: Gpu(Nvml(), None, "H100"))
    assert EnergyMeter.of("cuda", root).energy.told.startswith("NVML H100 and RAPL package-0")
    alone = EnergyMeter.of("cuda", root / "nowhere").energy
    assert alone.joules == 0.0
    assert alone.told.startswith("NVML H100; without the processor: this machine has no energy counters")
