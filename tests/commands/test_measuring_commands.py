"""`halftone compress`, `evaluate`, `bench` and `artifacts` as a person or a script meets them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from serve.cli import app
from serve.errors import SetupError
from serve.evaluation import STORIES

ROOT = Path(__file__).resolve().parents[2]
STORYTELLER = "builtin:storyteller"


@pytest.fixture(autouse=True)
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HALFTONE_ARTIFACTS", str(tmp_path / "artifacts"))
    return tmp_path / "artifacts"


def halftone(*arguments: str) -> Result:
    return CliRunner().invoke(app, arguments)


def answer(*arguments: str) -> Any:
    done = halftone(*arguments, "--json")
    assert done.exit_code == 0, done.stderr
    return json.loads(done.stdout)


def refusal(*arguments: str) -> str:
    done = halftone(*arguments)
    assert isinstance(done.exception, SetupError), done.output
    return done.exception.message


def states() -> dict[str, str]:
    return {row["fingerprint"]: row["state"] for row in answer("artifacts", "list")["artifacts"]}


def test_compress_keeps_an_artifact_and_the_second_time_finds_it(store: Path) -> None:
    first = answer("compress", STORYTELLER, "--recipe", "int8", "--device", "cpu")
    again = answer("compress", STORYTELLER, "--recipe", "int8", "--device", "cpu")
    assert (first["artifact_hit"], again["artifact_hit"]) == (False, True)
    assert first["fingerprint"] == again["fingerprint"]
    assert states() == {first["fingerprint"]: "sound"}


def test_compress_writes_a_folder_that_is_a_model_like_any_other(tmp_path: Path, store: Path) -> None:
    out = tmp_path / "small"
    report = answer("compress", STORYTELLER, "--recipe", "int8", "--out", str(out), "--device", "cpu")
    assert (report["out"], report["recipe"]) == (str(out), "int8")
    assert (out / "config.json").is_file()
    assert not store.exists()
    assert "exists already" in refusal("compress", STORYTELLER, "--recipe", "int8", "--out", str(out))


@pytest.mark.parametrize("into", ["store", "folder"])
def test_compress_notes_the_quality_that_evaluate_measures(into: str, tmp_path: Path, store: Path) -> None:
    text = ("--text", str(STORIES), "--limit", "2", "--device", "cpu")
    out = ("--out", str(tmp_path / "small")) if into == "folder" else ()
    noted = answer("compress", STORYTELLER, "--recipe", "int8", *out, *text)["quality"]
    folder = tmp_path / "small" if out else next(store.glob("*/"))
    assert json.loads((folder / "manifest.json").read_text())["quality"] == noted
    (row,) = answer("evaluate", STORYTELLER, "--recipe", "int8", "--no-speed", "--fresh", *text)["rows"]
    assert noted["reference"] == "fp32"
    assert noted["kl_divergence"] == pytest.approx(row["kl_divergence"]["mean"])
    assert {key: noted[key] for key in ("accuracy", "flips", "top1_agreement", "perplexity_ratio")} == pytest.approx(
        {key: row[key] for key in ("accuracy", "flips", "top1_agreement", "perplexity_ratio")}
    )


def test_compress_prints_what_came_of_it() -> None:
    shown = halftone("compress", STORYTELLER, "--recipe", "int8", "--device", "cpu", "--fresh").stdout
    assert "bits per weight" in shown
    assert "than 16 bit" in shown


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["compress", STORYTELLER, "--recipe", "int9"], "unknown name 'int9'"),
        (["compress", STORYTELLER, "--recipe", "rtn4", "--format", "gptq"], "say which name it gets with --out"),
        (["compress", "./none", "--recipe", "int8"], "no such folder"),
        (["compress", STORYTELLER, "--recipe", "int8", "--fresh", "--text", str(STORIES)], "--fresh keeps nothing"),
        (["compress", STORYTELLER, "--recipe", "int8", "--text", "none.txt"], "none.txt: no such text file"),
        (["compress", STORYTELLER, "--recipe", "int8", "--limit", "3"], "name the text to measure on"),
        (["evaluate", STORYTELLER, "--recipe", "int8+nf4"], "two quantizers"),
        (["evaluate", STORYTELLER, "--recipe", "int8", "--plot", "plot.doc"], "must end in"),
        (["bench", STORYTELLER, "--recipe", "gptq4-x9"], "unknown option 'x9'"),
    ],
)
def test_a_mistake_is_said_before_anything_is_measured(arguments: list[str], told: str) -> None:
    assert told in refusal(*arguments)


def test_a_damaged_artifact_is_found_by_verify_and_removed_by_prune(store: Path) -> None:
    fingerprint = answer("compress", STORYTELLER, "--recipe", "int8", "--device", "cpu")["fingerprint"]
    kept = answer("compress", STORYTELLER, "--recipe", "rtn4", "--device", "cpu")["fingerprint"]
    part = next((store / fingerprint).glob("*.safetensors"))
    part.write_bytes(part.read_bytes()[:-1] + b"\x55")
    (store / ".partial-0123").mkdir()
    assert fingerprint in refusal("artifacts", "verify")
    removed = answer("artifacts", "prune")
    assert set(removed["removed"]) == {fingerprint, ".partial-0123"}
    assert removed["freed_bytes"] > 0
    assert states() == {kept: "sound"}
    assert answer("artifacts", "verify")["artifacts"][0]["recipe"] == "rtn4"


def test_prune_all_keeps_what_it_is_told_to(store: Path) -> None:
    assert answer("artifacts", "prune")["removed"] == []
    kept = answer("compress", STORYTELLER, "--recipe", "int8", "--device", "cpu")["fingerprint"]
    gone = answer("compress", STORYTELLER, "--recipe", "rtn4", "--device", "cpu")["fingerprint"]
    assert "no such artifact" in refusal("artifacts", "prune", "--all", "--keep", "0000")
    assert answer("artifacts", "prune", "--all", "--keep", kept)["removed"] == [gone]
    assert answer("artifacts", "prune", "--all")["removed"] == [kept]


class Running:
    """`halftone` as its own process group, as in a terminal."""

    def __init__(self, *arguments: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "serve", *arguments],
            cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, start_new_session=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    def until(self, part: str) -> None:
        assert self.process.stderr is not None
        lines = []
        for line in self.process.stderr:
            lines.append(line)
            if part in line:
                return
        raise AssertionError(f"{part!r} never came: {lines}")

    def interrupt(self) -> None:
        os.killpg(self.process.pid, signal.SIGINT)

    def end(self) -> tuple[int, str, str]:
        out, err = self.process.communicate(timeout=120)
        return self.process.returncode, out, err


@pytest.fixture
def start() -> Iterator[Any]:
    running: list[Running] = []

    def begin(*arguments: str) -> Running:
        running.append(Running(*arguments))
        return running[-1]

    yield begin
    for one in running:
        if one.process.poll() is None:
            one.process.kill()
            one.process.wait()
        for pipe in (one.process.stdout, one.process.stderr):
            assert pipe is not None
            pipe.close()


@pytest.mark.slow
def test_evaluate_and_bench_together_put_json_alone_on_standard_output(start: Any, tmp_path: Path) -> None:
    plot = tmp_path / "plot.png"
    code, out, err = start(
        "evaluate", STORYTELLER, "--recipe", "int8", "--reference", "bf16", "--limit", "2", "--json",
        "--plot", str(plot), "--threads", "1", "--device", "cpu",
    ).end()  # fmt: skip
    assert code == 0, err
    found = json.loads(out)
    (row,) = found["rows"]
    assert (found["reference"], row["recipe"]) == ("bf16", "int8")
    assert [(s["phase"], s["batch_size"]) for s in row["speed"]] == [
        ("prefill", 1), ("decode", 1), ("decode", 8), ("decode", 16)
    ]  # fmt: skip
    assert row["efficiency"] > 0
    assert row["details"]["bench"]["artifact_hit"]  # compressed once, for quality and speed alike
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert "4/4 int8 speed: done" in err


@pytest.mark.slow
def test_an_interrupt_prints_what_was_measured_so_far(start: Any) -> None:
    running = start(
        "evaluate", STORYTELLER, "--recipe", "bf16", "--recipe", "int8", "--limit", "2", "--json", "--no-speed",
        "--device", "cpu",
    )  # fmt: skip
    running.until("2/3 bf16: done")
    running.interrupt()
    code, out, err = running.end()
    assert code == 130
    assert [row["recipe"] for row in json.loads(out)["rows"]] == ["bf16"]
    assert "Interrupted" in err
    assert "Traceback" not in err


def test_asking_loads_no_torch() -> None:
    code = (
        "import sys, serve.cli, serve.bench, serve.evaluation, serve.commands.evaluate; print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
