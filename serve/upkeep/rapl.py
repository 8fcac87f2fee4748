"""The processor's own energy counters (RAPL: Running Average Power Limit), through Linux' powercap folder.

    /sys/class/powercap/intel-rapl:0/          name: package-0        one processor, cores and caches and all
    /sys/class/powercap/intel-rapl:0:0/        name: core             a part of it
    /sys/class/powercap/intel-rapl:0:1/        name: dram             the memory beside it, where it is counted
    /sys/class/powercap/intel-rapl:1/          name: psys             the whole board, packages included

AMD's processors have the same counters under the same names. `energy_uj` counts microjoules up to `max_energy_range_uj`
and begins again at 0, every few minutes to hours. Since CVE-2020-8694 root alone may read it on most systems; virtual
machines rarely have it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from serve.errors import Unmeasurable

__all__ = ["POWERCAP", "Rapl"]

POWERCAP = Path("/sys/class/powercap")
_CONTROLS = ("intel-rapl", "intel-rapl-mmio")
"""The same counters by two ways, where a machine has both: the first that is there is read."""


@dataclass
class _Zone:
    """One counter. `last_uj` is what it said when it was read last."""

    name: str
    file: Path
    range_uj: int
    last_uj: int = 0


class Rapl:
    """All packages of the machine, and the memory that is counted beside them. Raises Unmeasurable, with the remedy."""

    def __init__(self, folder: Path = POWERCAP) -> None:
        self._zones = _zones(folder)
        for zone in self._zones:
            zone.last_uj = _number(zone.file)

    @property
    def name(self) -> str:
        return f"RAPL {', '.join(zone.name for zone in self._zones)}"

    def take_joules(self) -> float:
        """Since it was last asked. More than one wrap between two questions would go unseen: ask every few seconds."""
        taken_uj = 0
        for zone in self._zones:
            now_uj = _number(zone.file)
            taken_uj += now_uj - zone.last_uj + (zone.range_uj if now_uj < zone.last_uj else 0)
            zone.last_uj = now_uj
        return taken_uj / 1e6


def _zones(folder: Path) -> list[_Zone]:
    if not folder.is_dir():
        raise Unmeasurable(f"this machine has no energy counters: {folder} is missing, as in most virtual machines")
    for control in _CONTROLS:
        paths = sorted(path for path in folder.iterdir() if re.fullmatch(rf"{control}(:\d+)+", path.name))
        named = [(_text(path / "name"), path) for path in paths]
        # Parts of a package are left out, and so is the board as a whole: both would count it twice.
        if any(name.startswith("package") for name, _ in named):
            counted = [(name, path) for name, path in named if name.startswith("package") or name == "dram"]
            return [_Zone(name, path / "energy_uj", _number(path / "max_energy_range_uj")) for name, path in counted]
    raise Unmeasurable(f"this machine has no energy counters: {folder} knows no processor package")


def _number(file: Path) -> int:
    text = _text(file)
    try:
        return int(text)
    except ValueError:
        raise Unmeasurable(f"{file} holds {text[:40]!r} where microjoules were expected") from None


def _text(file: Path) -> str:
    try:
        return file.read_text().strip()
    except PermissionError:
        raise Unmeasurable(f"{file} may not be read: root has to allow it, as by chmod a+r") from None
    except OSError as error:
        raise Unmeasurable(f"{file} cannot be read: {error.strerror}") from None
