"""The engine's speed: what is counted, and that a bench of a real model hangs together."""

from __future__ import annotations

import json
import threading
from queue import SimpleQueue

import pytest

from serve.bench import BenchSettings, run_bench
from serve.bench.measure import _Served, _Step, decode_rate, measure
from serve.compression.recipe import Recipe
from serve.errors import ConfigError, SetupError
from serve.generation import Delta

TINY = BenchSettings(prompt_tokens=16, decode_tokens=8, batch_sizes=(1, 2), repeats=2, threads=1)
STORYTELLER = "builtin:storyteller"


def silent(stage: str, done: int, total: int) -> None:
    pass


def step(at_s: float, *names: str, ended: str = "") -> _Step:
    return _Step(at_s, dict.fromkeys(names, 1), frozenset(ended))


def test_decode_counts_only_while_the_whole_batch_decodes() -> None:
    steps = [
        step(0.0, "a"),  # b is still being prefilled
        step(1.0, "a", "b"),  # the batch is whole from here
        step(1.5, "a", "b"),
        step(2.0, "a", "b", ended="a"),
        step(9.0, "b", ended="b"),  # the batch has run empty
    ]
    assert decode_rate(steps, 2) == pytest.approx(4 / 1.0)


def test_a_batch_that_never_decoded_together_is_refused() -> None:
    with pytest.raises(SetupError, match="raise --decode-tokens"):
        decode_rate([step(0.0, "a", ended="a"), step(1.0, "b"), step(2.0, "b", ended="b")], 2)


def test_a_bench_measures_each_phase_and_batch_size_and_says_which_path_ran() -> None:
    told: list[tuple[str, int, int]] = []
    found = measure(STORYTELLER, Recipe.parse("int8"), TINY, lambda *state: told.append(state), device="cpu")
    assert [(speed.phase, speed.batch_size) for speed in found.speed] == [("prefill", 1), ("decode", 1), ("decode", 2)]
    for speed in found.speed:
        assert len(speed.runs_tokens_per_s) == 2
        assert min(speed.runs_tokens_per_s) <= speed.tokens_per_s <= max(speed.runs_tokens_per_s)
    assert found.path.startswith(("native path", "plain path"))
    assert found.total_bytes == found.weight_bytes + found.quantization_bytes + found.embedding_bytes
    assert found.ready_s >= found.load_s > 0
    assert 0 < found.resident_bytes <= found.peak_bytes
    assert ("decode 2", 8, 9) in told


def test_only_the_step_that_holds_a_batch_waits_for_it() -> None:
    """The thread tells a step, then looks at the gate: by then the next batch may have closed it."""
    served = _Served.__new__(_Served)
    served._steps, served._gate, served._holder = SimpleQueue(), threading.Event(), "holder"
    late = threading.Thread(
        target=served._on_step, args=([Delta("last of the batch before", 0, "", (1,))],), daemon=True
    )
    late.start()
    late.join(5)
    assert not late.is_alive()
    holding = threading.Thread(target=served._on_step, args=([Delta("holder", 0, "", (1,))],), daemon=True)
    holding.start()
    assert [set(served._steps.get().tokens) for _ in range(2)] == [{"last of the batch before"}, {"holder"}]
    holding.join(0.1)
    assert holding.is_alive()
    served._gate.set()
    holding.join(5)
    assert not holding.is_alive()


def test_a_prompt_that_does_not_fit_the_context_is_said_with_the_remedy() -> None:
    with pytest.raises(SetupError, match="lower --prompt-tokens or --decode-tokens"):
        measure(STORYTELLER, Recipe.parse("bf16"), BenchSettings(prompt_tokens=4096), silent, device="cpu")


def test_settings_that_measure_nothing_are_refused() -> None:
    with pytest.raises(ConfigError, match="repeats"):
        BenchSettings(repeats=0)
    with pytest.raises(ConfigError, match="batch_sizes"):
        BenchSettings(batch_sizes=())


def test_memory_is_that_of_the_model_not_of_who_asks() -> None:
    ballast = bytearray(b"x" * (1 << 30))
    found = run_bench(STORYTELLER, Recipe.parse("bf16"), TINY, silent, device="cpu", fresh=True)
    assert found.peak_bytes < len(ballast)
    assert json.loads(json.dumps(found.to_dict()))["bytes"] == found.total_bytes
