"""The engine's measurement: what is counted, what it is held against, and that a run hangs together."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from loadtest.engine import bars, measure
from loadtest.engine.bench_model import Shape, build
from loadtest.engine.render import markdown
from loadtest.engine.session import Order, Step, decode_rate, prefill_rate

ROOT = Path(__file__).parent.parent.parent
SMALL = Shape(hidden=64, intermediate=128, layers=2, heads=2, kv_heads=1, context=256)
LIMITS = {"bandwidth_bytes_per_s": 1e9, "bf16_ops_per_s": 1e12, "int8_ops_per_s": 2e12}
FACTS = {"version": "native path", "load_s": 1.5, "bytes_per_step": 10_000_000, "resident_bytes": 700_000_000}
FACTS |= {"peak_bytes": 800_000_000, "model_bytes": 300_000_000, "kv_cache_bytes": 50_000_000}
SHORT = ["--prompt-tokens", "8", "--decode-tokens", "4", "--batch-sizes", "1,2", "--repeats", "1", "--threads", "1"]


def order(**changes: int) -> Order:
    fields = {"threads": 1, "prompt_tokens": 8, "decode_tokens": 4, "vocabulary_size": 50_257}
    return Order(model="", precision="", batch_sizes=(1, 2), **{**fields, **changes})


def test_decode_counts_only_while_the_whole_batch_decodes() -> None:
    steps = [Step(0.0, [0]), Step(1.0, [0, 1]), Step(1.5, [0, 1]), Step(2.0, [0, 1]), Step(9.0, [1])]
    assert decode_rate(steps, batch_size=2, max_tokens=4) == pytest.approx(4 / 1.0)


def test_a_batch_that_never_decoded_together_is_refused() -> None:
    with pytest.raises(RuntimeError, match="more decode tokens"):
        decode_rate([Step(0.0, [0]), Step(1.0, [0]), Step(2.0, [1])], batch_size=2, max_tokens=2)


def test_prefill_ends_with_the_first_token() -> None:
    assert prefill_rate(128, 1.0, [Step(3.0, [0]), Step(9.0, [0])]) == pytest.approx(64)


def test_the_bench_model_is_the_same_for_everyone_and_transformers_reads_it(shared: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    for name in ("one", "two"):
        assert build(tmp_path / name, shared / "data" / "gpt2-tokenizer", SMALL) == SMALL
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "two")]
    assert weights[0] == weights[1]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "one", dtype="auto")
    assert str(model.dtype) == "torch.bfloat16"
    assert model.lm_head.weight.float().std().item() == pytest.approx(0.02, rel=0.01)
    layers = sum(p.numel() for name, p in model.model.layers.named_parameters() if "norm" not in name)
    assert layers == SMALL.layer_parameters
    assert model.lm_head.weight.numel() == SMALL.head_parameters
    assert AutoTokenizer.from_pretrained(tmp_path / "one").encode("Hello world") == [15496, 995]


def measured(speeds: dict[tuple[str, str, str, int], float]) -> dict:
    found = measure.Found(Shape(), order(prompt_tokens=128, decode_tokens=64), limits=[LIMITS])
    for (engine, precision, phase, batch_size), speed in speeds.items():
        found.runs[engine, precision, phase, batch_size] = [0.5 * speed, speed, 3 * speed]
        found.facts[engine, precision] = [FACTS]
    return measure.result(found)


def test_a_ratio_is_to_the_lower_of_the_two_limits_and_counts_the_cache() -> None:
    rows = measured({("halftone", "bf16", "decode", 1): 50.0, ("halftone", "bf16", "prefill", 1): 1000.0})["rows"]
    decode, prefill = rows
    read_bytes = 10e6 + (128 + 32) * 16 * 2 * 4 * 64 * 2
    assert decode["tokens_per_s"] == 50.0, "the median"
    assert decode["limit_ratio"] == pytest.approx(50 * read_bytes / 1e9)
    ops = 2 * (128 * Shape().layer_parameters + Shape().head_parameters)
    assert prefill["limit_tokens_per_s"] == pytest.approx(128 / (ops / 1e12))


def test_bars_take_the_best_peer_of_those_that_were_measured() -> None:
    speeds = {
        ("halftone", "int8", "decode", 8): 300.0,
        ("llama.cpp", "Q8_0", "decode", 8): 150.0,
        ("transformers", "dynamic-int8", "decode", 8): 250.0,
        ("halftone", "int8", "decode", 1): 100.0,
    }
    found = {bar["what"]: bar for bar in bars.judge(measured(speeds))}
    against = found["decode 8 against transformers dynamic-int8, the best of 2"]
    assert against["measured"] == pytest.approx(1.2)
    assert not against["met"]
    assert "decode 1 against llama.cpp Q8_0" not in found, "it was not measured"
    assert found["resident bytes beyond weights and KV cache"]["measured"] == 350_000_000
    assert found["ready from an artifact, seconds"]["met"]


@pytest.mark.slow
def test_engines_take_turns_on_one_model_and_a_later_run_adds_to_the_first(shared: Path, tmp_path: Path) -> None:
    build(tmp_path / "model", shared / "data" / "gpt2-tokenizer", SMALL)
    out = tmp_path / "engine.json"
    command = [sys.executable, "-m", "loadtest", "engine", "--model", str(tmp_path / "model"), "--output", str(out)]
    command += ["--engines", "halftone,transformers", "--precisions", "bf16", *SHORT]
    first = subprocess.run([*command, "--rounds", "1"], capture_output=True, text=True, cwd=ROOT, check=False)
    assert first.returncode == 0, first.stderr
    last_line = json.loads(first.stdout.splitlines()[-1])
    assert last_line == json.loads(out.read_text())
    keys = {(row["engine"], row["phase"], row["batch_size"]) for row in last_line["rows"]}
    jobs = {("prefill", 1), ("decode", 1), ("decode", 2)}
    assert keys == {(engine, *job) for engine in ("halftone", "transformers") for job in jobs}
    assert all(row["tokens_per_s"] > 0 and row["resident_bytes"] > 0 and row["load_s"] > 0 for row in last_line["rows"])

    again = subprocess.run(
        [*command, "--rounds", "1", "--resume", "--json"], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert again.returncode == 0, again.stderr
    result = json.loads(again.stdout)
    assert all(len(row["runs_tokens_per_s"]) == 2 for row in result["rows"])
    assert len(result["limits"]) == 2
    shown = markdown(result)
    assert "| halftone bf16 |" in shown
    assert "decode 2 " in shown
