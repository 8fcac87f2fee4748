"""Work in a process of its own: results, progress and errors come back, and a death is told in a line."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from multiprocessing.context import SpawnProcess
from pathlib import Path

import pytest

from serve.errors import ConfigError, SetupError
from serve.fresh_process import Progress, run


def tell_and_add(progress: Progress, a: int, *, b: int) -> tuple[int, int]:
    progress("adding", 1, 2)
    return a + b, os.getpid()


def refuse(progress: Progress) -> None:
    raise ConfigError("text", "is empty")


def die(progress: Progress) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def ignores_interrupts(progress: Progress) -> bool:
    os.kill(os.getpid(), signal.SIGINT)
    return True


def silent(stage: str, done: int, total: int) -> None:
    pass


def test_the_result_and_the_progress_come_back_from_another_process() -> None:
    told: list[tuple[str, int, int]] = []
    total, process = run(lambda *state: told.append(state), tell_and_add, 1, b=2)
    assert (total, told) == (3, [("adding", 1, 2)])
    assert process != os.getpid()


def test_the_program_of_the_parent_is_not_imported_again(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(
        "print('imported', flush=True)\n"
        "if __name__ == '__main__':\n"
        "    from serve.fresh_process import run\n"
        "    print(run(lambda *state: None, repr))\n"
    )
    told = subprocess.run([sys.executable, program], capture_output=True, text=True, check=True).stdout.splitlines()
    assert told[0] == "imported"
    assert len(told) == 2


def test_an_error_raised_on_purpose_is_raised_here_as_it_was() -> None:
    with pytest.raises(ConfigError, match="is empty"):
        run(silent, refuse)


def test_a_process_that_is_killed_becomes_one_line_that_says_so() -> None:
    with pytest.raises(SetupError, match="was killed; the system does so when memory runs out"):
        run(silent, die)


def test_only_the_parent_hears_an_interrupt() -> None:
    assert run(silent, ignores_interrupts)
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, ())


def test_an_interrupt_while_the_process_starts_is_not_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    start = SpawnProcess.start

    def interrupted(process: SpawnProcess) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        start(process)

    monkeypatch.setattr(SpawnProcess, "start", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(silent, tell_and_add, 1, b=2)
