"""Who takes part: every engine at every precision that it has, and how each is started."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from loadtest.engine.session import Order
from loadtest.errors import InputError, WorkerError
from loadtest.results import Json

ROOT = Path(__file__).resolve().parent.parent.parent
PEERS = "loadtest.engine.peers"
OURS = "halftone"
DETAIL_LENGTH = 500
CALIBRATION_SAMPLES = 8  # random weights have no quality to keep, and speed does not depend on it


@dataclass(frozen=True)
class Contestant:
    """An engine at a precision. `like` is our precision that it competes with; `ops` the arithmetic that limits it.

    A peer has a `module` of ours that drives it and an `environment` (a folder of `make peers`; None is the project's
    own); ours has a `recipe`.
    """

    engine: str
    precision: str
    like: str
    ops: str
    module: str = ""
    environment: str | None = None
    recipe: str = ""
    gguf: bool = False

    @property
    def name(self) -> str:
        return f"{self.engine} {self.precision}"


# 8- and 4-bit recipes take the int8 head, as llama.cpp's formats do.
CONTESTANTS = (
    Contestant(OURS, "bf16", "bf16", "bf16", recipe="bf16"),
    Contestant("llama.cpp", "BF16", "bf16", "bf16", f"{PEERS}.llama_cpp_low_level", "llama.cpp", gguf=True),
    Contestant("vllm", "bf16", "bf16", "bf16", f"{PEERS}.vllm_cpu", "vllm"),
    Contestant("transformers", "bf16", "bf16", "bf16", f"{PEERS}.static_generate"),
    Contestant(OURS, "int8", "int8", "int8", recipe="int8+head8"),
    Contestant("llama.cpp", "Q8_0", "int8", "int8", f"{PEERS}.llama_cpp_low_level", "llama.cpp", gguf=True),
    Contestant("transformers", "dynamic-int8", "int8", "int8", f"{PEERS}.static_generate"),
    Contestant(OURS, "gptq4", "gptq4", "bf16", recipe="gptq4+head8"),
    Contestant("llama.cpp", "Q4_0", "gptq4", "int8", f"{PEERS}.llama_cpp_low_level", "llama.cpp", gguf=True),
    Contestant(OURS, "nf4", "nf4", "bf16", recipe="nf4+head8"),
    Contestant("transformers", "bitsandbytes-nf4", "nf4", "bf16", f"{PEERS}.static_generate"),
)


@dataclass(frozen=True)
class Place:
    """Where everything lies: the model's folder and those environments."""

    model: Path
    peers: Path

    def python(self, contestant: Contestant) -> Path:
        """The interpreter that runs a peer; InputError with the remedy where it is not there."""
        if contestant.environment is None:
            return Path(sys.executable)
        found = self.peers / contestant.environment / "bin" / "python"
        if not found.exists():
            raise InputError(f"{contestant.engine} is not installed in {found.parent.parent}: run `make peers`")
        return found

    def gguf(self, precision: str) -> Path:
        return self.model / f"{precision}.gguf"


class Running(Protocol):
    """A contestant that can be asked for runs."""

    facts: Json

    def measure(self, jobs: list[tuple[str, int]], repeats: int, seed: str) -> list[tuple[str, int, float]]:
        """Phase, batch size and tokens per second of `repeats` runs of each job; `facts` is up to date afterwards."""
        ...

    def close(self) -> None: ...


class Peer:
    """A peer's process, loaded once; the first round warms it up."""

    def __init__(self, contestant: Contestant, order: Order, place: Place) -> None:
        self._name = contestant.name
        self._said = tempfile.TemporaryFile()  # noqa: SIM115 - closed in `close`
        model = place.gguf(contestant.precision) if contestant.gguf else place.model
        arguments = ["-m", contestant.module, replace(order, model=str(model), precision=contestant.precision).dump()]
        self._process = subprocess.Popen(
            [place.python(contestant), "-W", "ignore", *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._said,
            text=True,
            env=_environment(place, contestant, order.threads),
        )
        self._warm = False
        self.facts: Json = {}
        self.facts |= self._hear()

    def measure(self, jobs: list[tuple[str, int]], repeats: int, seed: str) -> list[tuple[str, int, float]]:
        if not self._warm:
            self._warm = True
            for phase, batch_size in jobs:
                self._ask(phase, batch_size, "warm-up")
        return [
            (phase, batch_size, self._ask(phase, batch_size, f"{seed}:{repeat}"))
            for phase, batch_size in jobs
            for repeat in range(repeats)
        ]

    def _ask(self, phase: str, batch_size: int, seed: str) -> float:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"phase": phase, "batch_size": batch_size, "seed": seed}) + "\n")
        self._process.stdin.flush()
        heard = self._hear()
        rate = float(heard.pop("tokens_per_s"))
        self.facts |= heard
        return rate

    def _hear(self) -> Json:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            code = self._process.wait()
            self._said.seek(0)
            said = self._said.read().decode(errors="replace").strip().splitlines()[-1:]
            raise WorkerError(f"{self._name} ended with exit code {code}: {''.join(said)[:DETAIL_LENGTH]}")
        return dict(json.loads(line))

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._said.close()


class Ours:
    """`halftone bench --json`: a new process for every turn, the artifact made beforehand."""

    def __init__(self, contestant: Contestant, order: Order, place: Place) -> None:
        self._recipe = contestant.recipe
        self._order = order
        self._source = place.model
        self.facts: Json = {}

    def measure(self, jobs: list[tuple[str, int]], repeats: int, seed: str) -> list[tuple[str, int, float]]:
        sizes = [size for phase, size in jobs if phase == "decode"]
        row = self._bench(sizes, repeats)
        self.facts = {
            "version": row["path"],
            "load_s": row["ready_s"],
            "bytes_per_step": row["weight_bytes"] + row["quantization_bytes"],
            "resident_bytes": row["resident_bytes"],
            "peak_bytes": row["peak_bytes"],
            "model_bytes": row["bytes"],
            "kv_cache_bytes": row["kv_cache_bytes"],
            "artifact_hit": row["artifact_hit"],
        }
        wanted = set(jobs)
        return [
            (speed["phase"], speed["batch_size"], rate)
            for speed in row["speed"]
            if (speed["phase"], speed["batch_size"]) in wanted
            for rate in speed["runs_tokens_per_s"]
        ]

    def prepare(self) -> None:
        """Compresses the model, so that later turns find the artifact."""
        self._bench([1], 1, decode_tokens=4)

    def _bench(self, sizes: list[int], repeats: int, decode_tokens: int | None = None) -> Json:
        order = self._order
        options: dict[str, Any] = {
            "--recipe": self._recipe,
            "--prompt-tokens": order.prompt_tokens,
            "--decode-tokens": decode_tokens or order.decode_tokens,
            "--repeats": repeats,
            "--threads": order.threads,
            "--device": "cpu",
            "--num-samples": CALIBRATION_SAMPLES,
        }
        words = [word for option, value in options.items() for word in (option, str(value))]
        words += [word for size in sizes or [1] for word in ("--batch-size", str(size))]
        command = [*_halftone(), "bench", str(self._source), *words, "--json"]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise WorkerError(f"halftone bench --recipe {self._recipe}: {done.stderr.strip()[-DETAIL_LENGTH:]}")
        return dict(json.loads(done.stdout)["rows"][0])

    def close(self) -> None:
        pass


def start(contestant: Contestant, order: Order, place: Place) -> Running:
    """Loads a contestant; WorkerError where it cannot run."""
    return (Ours if contestant.engine == OURS else Peer)(contestant, order, place)


def prepare(contestant: Contestant, order: Order, place: Place) -> None:
    """What takes long and is done once: our artifact, or llama.cpp's file."""
    if contestant.engine == OURS:
        Ours(contestant, order, place).prepare()
    elif contestant.gguf and not (out := place.gguf(contestant.precision)).exists():
        words = [f"{PEERS}.gguf_file", str(place.model), contestant.precision, str(out)]
        command = [str(place.python(contestant)), "-m", *words]
        environment = _environment(place, contestant, order.threads)
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise WorkerError(f"{contestant.name}: {done.stderr.strip()[-DETAIL_LENGTH:]}")


def _halftone() -> list[str]:
    """The command beside this interpreter, or the one on the path."""
    beside = Path(sys.executable).with_name("halftone")
    found = str(beside) if beside.exists() else shutil.which("halftone")
    if found is None:
        raise InputError("there is no `halftone` command beside this Python or on the PATH")
    return [found]


def _environment(place: Place, contestant: Contestant, threads: int) -> dict[str, str]:
    """Few surprises: our modules on the path, the threads of every runtime said, the environment's tools first."""
    tools = place.python(contestant).parent
    return {
        **{name: value for name, value in os.environ.items() if not name.startswith("PYTHON")},
        "PYTHONPATH": str(ROOT),
        "PATH": f"{tools}{os.pathsep}{os.environ.get('PATH', '')}",
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_VERBOSITY": "error",
        "TOKENIZERS_PARALLELISM": "false",
    }
