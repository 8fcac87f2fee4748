"""Compiles `csrc/` once per machine and keeps the result on disk, named after everything that went into it.

No torch headers are involved, so it takes seconds and needs only a C++20 compiler.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tempfile
from fcntl import LOCK_EX, flock
from pathlib import Path

__all__ = ["compiled", "missing_features"]

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
_FLAGS = ("-std=c++20", "-O3", "-fPIC", "-shared", "-pthread", "-fno-math-errno", "-fvisibility=hidden")
_COMPILE_TIMEOUT_S = 300


def features() -> tuple[str, ...]:
    """The instruction sets to compile for, as Linux spells them: tiles where the CPU has them, else vectors."""
    return (*_VECTORS, *_TILES) if _present().issuperset(_TILES) else _VECTORS


def missing_features() -> list[str]:
    """Instruction sets without which there are no kernels, and which this CPU lacks."""
    present = _present()
    return [feature for feature in _VECTORS if feature not in present]


def compiled(instructions: tuple[str, ...] | None = None) -> Path | str:
    """The shared library, compiled now if it is not on disk yet; or one line that says why there is none."""
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++") or shutil.which("clang++")
    if compiler is None:
        return "no C++ compiler found (install g++ or set CXX)"
    flags = (*_FLAGS, *(_feature_flag(feature) for feature in instructions or features()))
    target = _cache_folder() / f"halftone-{_digest(compiler, flags)}.so"
    if target.exists():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        return _compile(compiler, flags, target)
    except OSError as error:
        return f"the kernels cannot be stored in {target.parent}: {error.strerror}"


def _present() -> frozenset[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return frozenset()
    return frozenset(next((line.split() for line in lines if line.startswith("flags")), []))


def _feature_flag(feature: str) -> str:
    return "-m" + (feature.replace("_", "-") if feature.startswith("amx") else feature.replace("_", ""))


def _compile(compiler: str, flags: tuple[str, ...], target: Path) -> Path | str:
    with target.with_suffix(".lock").open("w") as lock:
        flock(lock, LOCK_EX)  # several replicas start at once; one of them compiles
        if target.exists():
            return target
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            output = Path(folder) / target.name
            command = [compiler, *flags, "-o", str(output), str(_SOURCES / "halftone.cpp")]
            try:
                subprocess.run(command, check=True, capture_output=True, text=True, timeout=_COMPILE_TIMEOUT_S)
            except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
                errors = [line for line in str(error.stderr).splitlines() if "error" in line]
                return f"{compiler} could not compile the kernels: {(errors or [str(error)])[0]}"
            output.replace(target)
    return target


def _cache_folder() -> Path:
    base = os.environ.get("HALFTONE_KERNEL_CACHE")
    if base:
        return Path(base)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "halftone" / "kernels"


def _digest(compiler: str, flags: tuple[str, ...]) -> str:
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False).stdout
    digest = hashlib.sha256(repr((version, flags)).encode())
    for source in sorted(_SOURCES.iterdir()):
        digest.update(source.read_bytes())
    return digest.hexdigest()[:16]
