"""The folder in which Linux counts a processor's energy, with numbers that a test sets."""

from __future__ import annotations

from pathlib import Path

__all__ = ["RANGE_UJ", "Powercap"]

RANGE_UJ = 262_143_328_850


class Powercap:
    """A folder as Linux has it: two packages, one with its cores and its memory, and the board."""

    def __init__(self, root: Path, control: str = "intel-rapl") -> None:
        self._root, self._control = root, control
        for zone, name in (("0", "package-0"), ("0:0", "core"), ("0:1", "dram"), ("1", "package-1"), ("2", "psys")):
            folder = root / f"{control}:{zone}"
            folder.mkdir(parents=True)
            (folder / "name").write_text(f"{name}\n")
            (folder / "max_energy_range_uj").write_text(f"{RANGE_UJ}\n")
            self.set(zone, 1_000_000_000)
        (root / control).mkdir()

    def file(self, zone: str) -> Path:
        return self._root / f"{self._control}:{zone}" / "energy_uj"

    def set(self, zone: str, uj: int) -> None:
        self.file(zone).write_text(f"{uj}\n")

    def add(self, zone: str, joules: float) -> None:
        self.set(zone, (int(self.file(zone).read_text()) + int(joules * 1e6)) % RANGE_UJ)
