"""Do two generators see the same server? By hand, alone: `python tests/loadtest/measure_guidellm.py`.

Serves the bench model (`python -m loadtest engine --prepare` makes it) on half of the cores, so that the generator,
which needs one of its own, does not slow the server; guidellm takes much more of it than ours. Sends one workload,
prompts and lengths alike, with guidellm (`make peers`) and with ours in turns: a closed loop with one client (several
fall into step, as two generators do differently), and an open loop at a constant rate. Prints each generator's medians
over the turns and how far ours is from guidellm's, whose inter-token latency is one mean per request: our `tpot_s`.
Then, of our last turn, each percentile beside the bucket that the server's own `/metrics` has it in.
"""

from __future__ import annotations

import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
from argparse import ArgumentParser
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from running import Halftone  # noqa: E402

GUIDELLM = Path(os.environ.get("HALFTONE_PEERS", ROOT / ".peers")) / "guidellm" / "bin" / "guidellm"
MODEL = Path.home() / ".cache" / "halftone" / "bench-model"
OUTPUT_TOKENS = 32
WORDS = ("once", "upon", "a", "time", "there", "was", "girl", "dog", "who", "liked", "to", "play", "big", "red", "ball")
LOADS = {"1 client": ("concurrency", 1, 30), "1 a second": ("rate", 1, 40)}
GUIDELLM_NAMES = {
    "ttft_s": ("time_to_first_token_ms", 1e-3),
    "tpot_s": ("inter_token_latency_ms", 1e-3),
    "e2e_s": ("request_latency", 1.0),
}
POINTS = ("p50", "p90")


def write_config(path: Path) -> Path:
    engine = {"threads": max(1, (os.cpu_count() or 2) // 2)}
    document = {
        "model": {"name": MODEL.name, "source": str(MODEL)},
        "variants": [{"name": "only", "recipe": "bf16", "engine": engine}],
    }
    path.write_text(json.dumps(document))
    return path


def write_prompts(path: Path, count: int, seed: str) -> Path:
    """Each prompt another one, so that no cache of prefixes answers whoever comes second faster."""
    draw = random.Random(seed)
    rows = [
        {"prompt": " ".join(draw.choices(WORDS, k=100)), "output_tokens_count": OUTPUT_TOKENS} for _ in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def ours(server: Halftone, prompts: Path, kind: str, level: int, requests: int) -> dict[str, float]:
    command = [
        sys.executable,
        "-m",
        "loadtest",
        "run",
        "--url",
        server.url,
        "--model",
        MODEL.name,
        "--api",
        "completions",
    ]
    command += ["--prompts", str(prompts), "--output-tokens", str(OUTPUT_TOKENS)]
    command += ["--ignore-eos", "--temperature", "0"]
    command += [f"--{kind}", str(level), "--num-requests", str(requests), "--warmup", "0", "--json", "--quiet"]
    command += ["--arrivals", "constant"] if kind == "rate" else []
    command += ["--server-metrics", f"{server.url}/metrics"]
    done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT)
    result = json.loads(done.stdout)
    prompts.with_suffix(".server.json").write_text(json.dumps(result["server_metrics"]))
    overall = result["overall"]
    assert overall["errors"] == {}, overall["errors"]
    found = {f"{name} {point}": overall[name][point] for name in GUIDELLM_NAMES for point in POINTS}
    return found | {"tokens/s": overall["tokens_per_s"]}


def guidellm(server: Halftone, prompts: Path, kind: str, level: int, requests: int) -> dict[str, float]:
    output = prompts.with_suffix(".result.json")
    profile = f"kind=concurrent,streams={level}" if kind == "concurrency" else f"kind=constant,rate={level}"
    command = [str(GUIDELLM), "run", "--disable-console", "--profile", profile]
    command += ["--constraint", f"kind=max_requests,count={requests}"]
    command += ["--backend", f"kind=openai_http,target={server.url},model={MODEL.name},request_format=/v1/completions"]
    command += ["--data", f"kind=json_file,path={prompts}", "--tokenizer", f"kind=hf_auto,model={MODEL}"]
    subprocess.run([*command, "--output", f"kind=json,path={output}"], check=True, capture_output=True, text=True)
    metrics = json.loads(output.read_text())["benchmarks"][0]["metrics"]
    assert metrics["request_totals"]["successful"] == requests, metrics["request_totals"]
    found = {
        f"{name} {point}": scale * metrics[theirs]["successful"]["percentiles"][point]
        for name, (theirs, scale) in GUIDELLM_NAMES.items()
        for point in POINTS
    }
    return found | {"tokens/s": metrics["output_tokens_per_second"]["successful"]["mean"]}


def print_server(load: str, path: Path) -> None:
    for name, seen in json.loads(path.read_text()).items():
        for point in ("p50", "p90", "p99") if seen["count"] else ():
            low, high = (edge and edge * 1e3 for edge in seen[point]["server_bucket"])
            agrees = "agrees" if seen[point]["agrees"] else "DIFFERS"
            print(
                f"{load:11} {name} {point}: {seen[point]['ours'] * 1e3:.2f} ms, server {low:g} to {high:g} ms: {agrees}"
            )


def main() -> None:
    options = ArgumentParser(description=__doc__)
    options.add_argument("--turns", type=int, default=3)
    turns = options.parse_args().turns
    generators = {"ours": ours, "guidellm": guidellm}
    with tempfile.TemporaryDirectory() as folder, Halftone(str(write_config(Path(folder) / "bench.yaml"))) as server:
        ours(server, write_prompts(Path(folder) / "warm.jsonl", 16, "warm"), "concurrency", 8, 16)
        print(f"{'':24} {'ours':>10} {'guidellm':>10}")
        for load, (kind, level, requests) in LOADS.items():
            seen: dict[str, list[dict[str, float]]] = {name: [] for name in generators}
            for name in [*generators] * turns:
                seed = f"{load} {name} {len(seen[name])}"
                prompts = write_prompts(Path(folder) / f"{seed.replace(' ', '-')}.jsonl", requests, seed)
                seen[name].append(generators[name](server, prompts, kind, level, requests))
            for figure in seen["ours"][0]:
                a, b = (statistics.median(run[figure] for run in seen[name]) for name in generators)
                scale, unit = (1.0, "") if figure == "tokens/s" else (1e3, " ms")
                print(f"{load:11} {figure:12} {a * scale:10.2f} {b * scale:10.2f}{unit:3} {a / b - 1:+7.1%}")
            print_server(load, max(Path(folder).glob("*.server.json"), key=lambda path: path.stat().st_mtime))


if __name__ == "__main__":
    main()
