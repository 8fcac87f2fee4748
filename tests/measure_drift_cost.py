"""What measuring drift costs users. By hand, alone: `python tests/measure_drift_cost.py`.

Serves the bench model (`python -m loadtest engine --prepare` makes it) at int8 beside bf16, its reference: without
drift, at a sample rate of 5 % and as the default configuration scores (20 %, for a twentieth of the time), in turns
with a server each, and asks as fast as eight clients can. Prints the medians of tokens per second, and what was scored.
"""

from __future__ import annotations

import json
import re
import statistics
import subprocess
import sys
import tempfile
from argparse import ArgumentParser
from pathlib import Path

import httpx

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from running import Halftone  # noqa: E402

MODEL = Path.home() / ".cache" / "halftone" / "bench-model"
SETTINGS = {
    "none": {"sample_rate": 0.0},
    "5 %": {"sample_rate": 0.05},
    "default": {"sample_rate": 0.2, "max_busy_ratio": 0.05},
}


def tokens_per_s(folder: Path, drift: dict[str, float], clients: int, duration: str) -> tuple[float, str]:
    document = {
        "model": {"name": "bench", "source": str(MODEL)},
        "variants": [{"name": "bf16", "recipe": "bf16"}, {"name": "int8", "recipe": "int8"}],
        "traffic": {"stable": "int8", "weights": {"int8": 100, "bf16": 0}},
        "drift": {"reference": "bf16", **drift},
    }
    config = folder / "drift.yaml"
    config.write_text(json.dumps(document))
    command = [sys.executable, "-m", "loadtest", "run", "--model", "bench", "--api", "completions", "--json", "--quiet"]
    command += ["--prompt-tokens", "uniform:32,96", "--output-tokens", "uniform:32,96", "--ignore-eos"]
    command += ["--concurrency", str(clients), "--duration", duration, "--warmup", "3s"]
    with Halftone(str(config)) as server:
        done = subprocess.run([*command, "--url", server.url], check=True, capture_output=True, text=True, cwd=ROOT)
        samples = re.findall(
            r"drift_samples_total\{.*result=\"(\w+)\".*\} (\S+)", httpx.get(f"{server.url}/metrics").text
        )
    counted = {result: int(float(count)) for result, count in samples if float(count)}
    return json.loads(done.stdout)["overall"]["tokens_per_s"], str(counted)


def main() -> None:
    options = ArgumentParser(description=__doc__)
    options.add_argument("--turns", type=int, default=3)
    options.add_argument("--clients", type=int, default=8)
    options.add_argument("--duration", default="15s")
    given = options.parse_args()
    seen: dict[str, list[float]] = {name: [] for name in SETTINGS}
    with tempfile.TemporaryDirectory() as folder:
        for name in [*SETTINGS] * given.turns:
            speed, counted = tokens_per_s(Path(folder), SETTINGS[name], given.clients, given.duration)
            seen[name].append(speed)
            print(f"{name}: {speed:.0f} tokens/s, {counted}", flush=True)
    medians = {name: statistics.median(speeds) for name, speeds in seen.items()}
    for name, median in medians.items():
        print(f"{name}: {median:.0f} tokens/s, {median / medians['none'] - 1:+.1%}")


if __name__ == "__main__":
    main()
