"""Compiles `csrc/` once per machine and keeps the result on disk, named after the sources and the instruction sets.

No torch headers are involved, so it takes seconds and needs only a C++20 compiler; what is on disk already needs none.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from contextlib import suppress
from fcntl import LOCK_EX, flock
from pathlib import Path
from signal import SIGKILL
from subprocess import DEVNULL, PIPE

__all__ = ["BUILDS", "Started", "compiled", "end", "is_compiled", "missing_features"]

_SOURCES = Path(__file__).parent / "csrc"
_VECTORS = (
    "avx512f",
    "avx512bw",
    "avx512vl",
    "avx512dq",
    "avx512_bf16",
    "avx512_vnni",
    "avx512_vbmi2",
    "popcnt",
    "bmi2",
    "fma",
)
_TILES = ("amx_tile", "amx_int8", "amx_bf16")
BUILDS = {"AVX-512": _VECTORS, "AMX": (*_VECTORS, *_TILES)}
"""The instruction sets of each library that there can be, by the one that gives it its name."""
_FLAGS = ("-std=c++20", "-O3", "-fPIC", "-shared", "-pthread", "-fno-math-errno", "-fvisibility=hidden")
_COMPILE_TIMEOUT_S = 300

Started = Callable[["subprocess.Popen[str]"], None]
"""Told of the compiler's process, so that somebody can end it."""


def features() -> tuple[str, ...]:
    """The instruction sets to compile for, as Linux spells them: tiles where the CPU has them, else vectors."""
    return BUILDS["AMX" if _present().issuperset(_TILES) else "AVX-512"]


def missing_features() -> list[str]:
    """Instruction sets without which there are no kernels, and which this CPU lacks."""
    present = _present()
    return [feature for feature in _VECTORS if feature not in present]


def is_compiled() -> bool:
    """Whether the shared library for this machine is on disk."""
    return _target(_flags(features())).exists()


def compiled(instructions: tuple[str, ...] | None = None, started: Started | None = None) -> Path | str:
    """The shared library, compiled now if it is not on disk yet; or one line that says why there is none."""
    flags = _flags(instructions or features())
    target = _target(flags)
    if target.exists():
        return target
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++") or shutil.which("clang++")
    if compiler is None:
        return "no C++ compiler found (install g++ or set CXX)"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        return _compile(compiler, flags, target, started or (lambda process: None))
    except OSError as error:
        return f"the kernels cannot be stored in {target.parent}: {error.strerror}"


def end(process: subprocess.Popen[str]) -> None:
    """End a compiler that still runs, and what it has started."""
    if process.poll() is None:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, SIGKILL)


def _flags(instructions: tuple[str, ...]) -> tuple[str, ...]:
    return (*_FLAGS, *(_feature_flag(feature) for feature in instructions))


def _target(flags: tuple[str, ...]) -> Path:
    digest = hashlib.sha256(repr(flags).encode())
    for source in sorted(_SOURCES.iterdir()):
        digest.update(source.read_bytes())
    return _cache_folder() / f"halftone-{digest.hexdigest()[:16]}.so"


def _present() -> frozenset[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return frozenset()
    return frozenset(next((line.split() for line in lines if line.startswith("flags")), []))


def _feature_flag(feature: str) -> str:
    return "-m" + (feature.replace("_", "-") if feature.startswith("amx") else feature.replace("_", ""))


def _compile(compiler: str, flags: tuple[str, ...], target: Path, started: Started) -> Path | str:
    with target.with_suffix(".lock").open("w") as lock:
        flock(lock, LOCK_EX)  # several replicas start at once; one of them compiles
        if target.exists():
            return target
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            output = Path(folder) / target.name
            errors = _run([compiler, *flags, "-o", str(output), str(_SOURCES / "halftone.cpp")], started)
            if errors is not None:
                return f"{compiler} could not compile the kernels: {errors}"
            output.replace(target)
    return target


def _run(command: list[str], started: Started) -> str | None:
    """What went wrong, in one line; None where nothing did."""
    try:
        running = subprocess.Popen(command, stdout=DEVNULL, stderr=PIPE, text=True, process_group=0)
    except OSError as error:
        return str(error)
    with running as process:
        started(process)
        try:
            _, told = process.communicate(timeout=_COMPILE_TIMEOUT_S)
        except subprocess.TimeoutExpired as error:
            end(process)
            return str(error)
    if process.returncode == 0:
        return None
    lines = [line for line in told.splitlines() if "error" in line]
    return lines[0] if lines else f"it ended with status {process.returncode}"


def _cache_folder() -> Path:
    base = os.environ.get("HALFTONE_KERNEL_CACHE")
    if base:
        return Path(base)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "halftone" / "kernels"
