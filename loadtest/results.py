"""How every measurement here is written down: what ran, where, with which versions, and what came out.

`run`, `compare` and `engine` share it, so that a result file always says enough to be repeated. It knows
nothing of what was measured.
"""

import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from loadtest.errors import InputError

Json = dict[str, Any]

SCHEMA = 1
_SECRET_OPTIONS = ("--header",)


def envelope(kind: str, body: Json, packages: Iterable[str] = ()) -> Json:
    """`body` under a head that says what it is and how it came to be; `packages` are named with their versions."""
    head: Json = {
        "kind": f"loadtest.{kind}",
        "schema": SCHEMA,
        "written_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": command_line(sys.argv),
        "machine": machine(),
        "versions": versions(packages),
    }
    return head | body


def command_line(argv: Sequence[str]) -> str:
    """The command as typed, without the values of options that may carry a secret."""
    words = ["python -m loadtest"]
    hide_next = False
    for word in argv[1:]:
        name, equals, _ = word.partition("=")
        if hide_next or (equals and name in _SECRET_OPTIONS):
            words.append(f"{name}=..." if equals and not hide_next else "...")
            hide_next = False
            continue
        hide_next = name in _SECRET_OPTIONS
        words.append(shlex.quote(word))
    return " ".join(words)


def machine() -> Json:
    """The machine the measurement ran *on*: for a remote server that is the client's machine, not the server's."""
    return {
        "cpu": _cpu_name(),
        "cpu_count": os.cpu_count(),
        "usable_cpus": _usable_cpus(),
        "memory_bytes": _memory_bytes(),
        "gpus": _gpus(),
        "system": f"{platform.system()} {platform.release()}",
    }


def versions(packages: Iterable[str] = ()) -> Json:
    """Python and the named packages; None for one that is not installed."""
    found: Json = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    return found


def write(result: Json, path: Path) -> None:
    """Writes beside, then renames, so that a reader never sees half a result."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f"{path.name}.partial")
    aside.write_text(json.dumps(result, indent=1) + "\n")
    aside.replace(path)


def read(path: Path, kind: str) -> Json:
    """A result written by `write`; InputError names what is wrong with any other file."""
    try:
        result = json.loads(path.read_text())
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from error
    except ValueError as error:
        raise InputError(f"{path}: not JSON ({error})") from error
    found = result.get("kind") if isinstance(result, dict) else None
    if found != f"loadtest.{kind}":
        raise InputError(f"{path}: expected a result of `loadtest {kind}`, found kind {found!r}")
    return dict(result)


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def _usable_cpus() -> int | None:
    """What this process may run on, which a container often makes fewer than the machine has."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count()


def _memory_bytes() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError):
        return None


def _gpus() -> list[str]:
    query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return [line.strip() for line in answer.stdout.splitlines() if line.strip()]
