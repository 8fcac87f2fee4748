"""What HTTP and Ray cost beyond the engine. By hand, alone: `python tests/loadtest/measure_http_path.py`.

Serves a model (which `python -m loadtest engine --prepare` makes) and sends it prompts over HTTP; the same engine in
process (`halftone bench`) runs the same lengths before and after, while the server rests, for a machine's speed moves.
Last, prompts of 1,500 tokens among 8 streams. `--recipe int8+head8` takes another precision.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import threading
import time
from argparse import ArgumentParser
from pathlib import Path
from statistics import fmean
from typing import Any

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from running import Halftone  # noqa: E402

MODEL = Path.home() / ".cache" / "halftone" / "bench-model"
PROMPT, OUTPUT, LONG = 128, 256, 1500


def in_process(recipe: str) -> tuple[float, float]:
    """Tokens per second of 16 sequences, and seconds to the first token of one."""
    command = [str(Path(sys.executable).with_name("halftone")), "bench", str(MODEL), "--recipe", recipe, "--json"]
    command += ["--prompt-tokens", str(PROMPT), "--decode-tokens", str(OUTPUT), "--batch-size", "16", "--repeats", "3"]
    row = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)["rows"][0]
    rates = {speed["phase"]: speed["tokens_per_s"] for speed in row["speed"]}
    return rates["decode"], PROMPT / rates["prefill"]


def run(server: Halftone, *arguments: object) -> dict[str, Any]:
    command = [sys.executable, "-m", "loadtest", "run", "--url", server.url, "--model", "bench", "--json", "--quiet"]
    command += ["--api", "completions", "--ignore-eos", "--temperature", "0", "--warmup", "0"]
    done = subprocess.run([*command, *map(str, arguments)], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    overall: dict[str, Any] = json.loads(done.stdout)["overall"]
    return overall


def lengths(prompt: int, output: int, concurrency: int, requests: int, seed: int = 0) -> tuple[object, ...]:
    load = ("--concurrency", concurrency, "--num-requests", requests, "--seed", seed)
    return ("--prompt-tokens", prompt, "--output-tokens", output, *load)


def main() -> None:
    options = ArgumentParser(description=__doc__)
    options.add_argument("--recipe", default="bf16")
    recipe = options.parse_args().recipe
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "bench.yaml"
        variant = {"name": "only", "recipe": recipe, "engine": {"max_num_seqs": 32}}
        config.write_text(json.dumps({"model": {"name": "bench", "source": str(MODEL)}, "variants": [variant]}))
        with Halftone(str(config)) as server:
            run(server, *lengths(PROMPT, 8, 16, 16, seed=1))
            before = in_process(recipe)
            first = run(server, *lengths(PROMPT, 1, 1, 30, seed=2))["ttft_s"]["p50"]
            streams = run(server, *lengths(PROMPT, OUTPUT, 16, 32, seed=3))
            after = in_process(recipe)
            engine_tokens_per_s, engine_ttft_s = (fmean(pair) for pair in zip(before, after, strict=True))
            print(f"in process, before and after: {before[0]:.0f} and {after[0]:.0f} tokens/s, "
                  f"TTFT {before[1] * 1e3:.1f} and {after[1] * 1e3:.1f} ms")  # fmt: skip
            whole = 16 * OUTPUT / (16 * engine_ttft_s + 16 * (OUTPUT - 1) / engine_tokens_per_s)
            compare("16 streams, decoding", engine_tokens_per_s, 16 / streams["itl_s"]["p50"])
            compare("16 streams, from first prompt to last token", whole, streams["tokens_per_s"])
            added_ms = 1e3 * (first - engine_ttft_s)
            print(
                f"TTFT p50: in process {engine_ttft_s * 1e3:.1f} ms, over HTTP {first * 1e3:.1f} ms (+{added_ms:.1f})"
            )
            alone = run(server, *lengths(LONG, 2, 1, 5, seed=4))["ttft_s"]["p50"]
            eight = lengths(24, 600, 8, 8, seed=5)
            calm = run(server, *eight)["itl_s"]["p99"]
            beside, disturbed = among(server, eight)
            print(f"ITL p99 of 8 streams: {calm * 1e3:.1f} ms, with long prompts {disturbed * 1e3:.1f} ms "
                  f"({disturbed / calm:.1f} x)")  # fmt: skip
            print(f"TTFT of {LONG} tokens: alone {alone * 1e3:.0f} ms, among 8 streams {beside * 1e3:.0f} ms "
                  f"({beside / alone:.2f} x)")  # fmt: skip


def compare(what: str, engine: float, over_http: float) -> None:
    print(f"{what}: in process {engine:.0f} tokens/s, over HTTP {over_http:.0f} ({over_http / engine:.0%})")


def among(server: Halftone, eight: tuple[object, ...]) -> tuple[float, float]:
    """Long prompts one after another while eight streams decode: TTFT p50 of those, ITL p99 of these."""
    found: dict[str, Any] = {}
    thread = threading.Thread(target=lambda: found.update(run(server, *eight)))
    thread.start()
    time.sleep(2.0)
    beside: float = run(server, *lengths(LONG, 2, 1, 4, seed=6), "--think-time", "500ms")["ttft_s"]["p50"]
    assert thread.is_alive(), "the eight streams ended first: raise their output"
    thread.join()
    return beside, found["itl_s"]["p99"]


if __name__ == "__main__":
    main()
