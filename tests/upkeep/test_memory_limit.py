"""What is left for a replica: the machine's, or its container's if that is tighter."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from serve.upkeep.limit import limit_of


def group(folder: Path, **files: object) -> Path:
    for name, content in files.items():
        path = folder / name.replace("__", "/").replace("memory_", "memory.")
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"{content}\n")
    return folder


def test_without_a_container_it_is_the_machine(tmp_path: Path) -> None:
    limit = limit_of("cpu", tmp_path)
    assert limit.total_bytes == psutil.virtual_memory().total
    assert 0 < limit.used_ratio < 1


def test_a_container_that_is_nearly_full_is_told_though_the_machine_has_room(tmp_path: Path) -> None:
    limit = limit_of(
        "cpu", group(tmp_path, memory_max=1_000_000, memory_current=970_000, memory_stat="inactive_file 0")
    )
    assert (limit.total_bytes, limit.available_bytes) == (1_000_000, 30_000)
    assert limit.used_ratio == pytest.approx(0.97)


def test_files_that_were_read_and_may_be_dropped_are_not_in_the_way(tmp_path: Path) -> None:
    stat = "anon 300000\ninactive_file 600000"
    limit = limit_of("cpu", group(tmp_path, memory_max=1_000_000, memory_current=970_000, memory_stat=stat))
    assert limit.used_ratio == pytest.approx(0.37)


def test_the_older_control_groups_are_read_too(tmp_path: Path) -> None:
    files = {
        "memory__memory_limit_in_bytes": 1_000_000,
        "memory__memory_usage_in_bytes": 400_000,
        "memory__memory_stat": "total_inactive_file 100000",
    }
    assert limit_of("cpu", group(tmp_path, **files)).used_ratio == pytest.approx(0.3)


@pytest.mark.parametrize("unlimited", ["max", 9_223_372_036_854_771_712])
def test_a_container_without_a_limit_is_the_machine(tmp_path: Path, unlimited: object) -> None:
    limit = limit_of("cpu", group(tmp_path, memory_max=unlimited, memory_current=5, memory_stat="inactive_file 0"))
    assert limit.total_bytes == psutil.virtual_memory().total
