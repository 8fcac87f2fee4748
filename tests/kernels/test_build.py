"""The kernels are optional: without a compiler, or with one that fails, there is a reason and no crash."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from serve.kernels import build


def test_a_second_build_finds_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HALFTONE_KERNEL_CACHE", str(tmp_path))
    first = build.compiled()
    assert isinstance(first, Path)
    written = first.stat().st_mtime_ns
    second = build.compiled()
    assert second == first
    assert first.stat().st_mtime_ns == written
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    assert build.compiled() == first  # what is on disk needs no compiler


def test_no_compiler_is_a_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HALFTONE_KERNEL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    assert "no C++ compiler" in str(build.compiled())


def test_a_compiler_that_fails_is_a_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = tmp_path / "c++"
    compiler.write_text("#!/bin/sh\n[ \"$1\" = --version ] && exit 0\necho 'x.cpp: error: no such thing' >&2\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setenv("HALFTONE_KERNEL_CACHE", str(tmp_path / "cache"))
    assert "no such thing" in str(build.compiled())
    assert not list((tmp_path / "cache").glob("*.so"))
    monkeypatch.setenv("CXX", str(tmp_path / "missing"))
    assert "No such file" in str(build.compiled())


def test_an_image_can_bring_the_kernels_of_every_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = tmp_path / "c++"
    compiler.write_text(
        '#!/bin/sh\nfor word; do [ "$last" = -o ] && output=$word; last=$word; done\necho "$*" > "$output"\n'
    )
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setenv("HALFTONE_KERNEL_CACHE", str(tmp_path / "cache"))
    subprocess.run([sys.executable, "-m", "serve.kernels", "--every-cpu"], check=True)
    libraries = [library.read_text() for library in (tmp_path / "cache").glob("*.so")]
    assert sorted("-mamx-tile" in asked for asked in libraries) == [False, True]
    assert build.is_compiled()
