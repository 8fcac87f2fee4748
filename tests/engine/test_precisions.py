"""One request's log-probabilities must not depend on who runs beside it, at any precision."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from serve.compression.recipe import Recipe
from serve.loading import load
from tests.engine.conftest import Desk, tiny_llama
from tests.engine.measure_kv_cache import compare


@pytest.mark.parametrize("recipe", ["fp32", "bf16", "int8", "int8-weight", "nf4", "gptq4-g64", "wanda50"])
def test_logprobs_beside_neighbours_are_those_alone(desks: Callable[..., Desk], shared: Path, recipe: str) -> None:
    """Teacher-forced at the same chunk boundaries: within 0.02 nats at the 99th percentile."""
    loaded = load(str(shared / "models" / "TinyStories-656K"), Recipe.parse(recipe))
    # A prompt is cut into the same chunks whether others decode beside it or not.
    desk = desks(loaded.model, loaded.tokenizer, max_num_batched_tokens=96, max_prefill_tokens_beside_decode=32)
    with (shared / "data" / "tinystories" / "eval.jsonl").open() as lines:
        text = json.loads(next(lines))["text"]
    story = list(loaded.tokenizer(text)["input_ids"])[:250]

    def scores(neighbours: int) -> torch.Tensor:
        # With no neighbour at all a prompt could take the whole budget: one stays, and keeps the chunks small.
        others = [desk.submit(story[:20], max_tokens=40, ignore_eos=True, seed=i) for i in range(neighbours + 1)]
        desk.wait_until(lambda: all(desk.answers[other].deltas[0] for other in others))
        answer = desk.ask(story, max_tokens=0, prompt_logprobs=0)
        desk.wait(*others)
        assert answer.prompt is not None
        return torch.tensor([entry.logprob for entry in answer.prompt.logprobs if entry])

    alone = scores(0)
    for neighbours in (3, 15):
        assert (scores(neighbours) - alone).abs().quantile(0.99) < 0.02


def test_a_kv_cache_in_int8_changes_less_than_computing_in_bf16_does(shared: Path) -> None:
    loaded = load(str(shared / "models" / "TinyStories-656K"), Recipe.parse("fp32"))
    with (shared / "data" / "tinystories" / "eval.jsonl").open() as lines:
        stories = [list(loaded.tokenizer(json.loads(next(lines))["text"])["input_ids"])[:512] for _ in range(8)]
    assert 0 < compare(loaded, stories)["kl_divergence"] < 0.00026, "the noise floor of bf16 on this model"


def test_a_kv_cache_in_int8_holds_almost_twice_the_tokens_of_bf16(desks: Callable[..., Desk]) -> None:
    budget = {"kv_cache_bytes": 2**20, "max_model_len": 64}
    blocks = [
        desks(tiny_llama(head_dim=64).bfloat16(), kv_cache_dtype=dtype, **budget).engine.stats().kv_blocks_total
        for dtype in ("auto", "int8")
    ]
    assert blocks[1] / blocks[0] == pytest.approx(128 / 68, rel=0.02)
