"""Answers whose beginning was computed for somebody else are the same answers, and say how much was there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from serve.kernels import unavailable
from tests.engine.conftest import Desk, greedy, tiny_llama
from tests.engine.test_native import heard, llama

Desks = Callable[..., Desk]

PREFIX = torch.randint(0, 256, (100,), generator=torch.Generator().manual_seed(1)).tolist()
BLOCK = 32


def cached_tokens(desk: Desk, prompt: list[int], **params: Any) -> int:
    answer = desk.ask(prompt, max_tokens=1, **params)
    assert answer.prompt is not None
    return answer.prompt.cached_tokens


def test_greedy_equals_generate_behind_a_beginning_that_another_request_computed(desks: Desks) -> None:
    model = tiny_llama()
    prompts = [[*PREFIX, *ending] for ending in ([1, 2, 3], [4, 5], [1, 2, 9, 9])]
    expected = [greedy(model, prompt, 30) for prompt in prompts]
    desk = desks(model)
    assert [desk.ask(prompt, max_tokens=30).tokens() for prompt in prompts] == expected
    assert desk.engine.stats().prefix_cache_hits == 2 * (100 // BLOCK * BLOCK)


@pytest.mark.skipif(unavailable() is not None, reason=f"no kernels: {unavailable()}")
def test_on_the_kernels_a_reused_beginning_changes_no_bit(desks: Desks) -> None:
    wanted = {"max_tokens": 40, "ignore_eos": True, "logprobs": 0}
    fresh = heard(desks(llama(), prefix_cache=False).ask(PREFIX, **wanted))
    desk = desks(llama())
    assert heard(desk.ask(PREFIX, **wanted)) == fresh
    assert heard(desk.ask(PREFIX, **wanted)) == fresh
    assert desk.engine.stats().prefix_cache_hits == 96


def test_a_conversation_goes_on_from_its_own_answer(desks: Desks) -> None:
    desk = desks(tiny_llama())
    answer = desk.ask(PREFIX, max_tokens=60, ignore_eos=True).tokens()
    # The last token of the answer was never computed; 159 were, four whole blocks and some.
    assert cached_tokens(desk, [*PREFIX, *answer, 5, 6]) == 159 // BLOCK * BLOCK


def test_choices_of_one_request_compute_their_prompt_once_and_answer_as_if_alone(desks: Desks) -> None:
    sampled = {"temperature": 1.0, "seed": 3, "max_tokens": 12, "ignore_eos": True}
    apart = desks(tiny_llama(), prefix_cache=False).ask(PREFIX, n=4, **sampled)
    desk = desks(tiny_llama())
    together = desk.ask(PREFIX, n=4, **sampled)
    assert [together.tokens(i) for i in range(4)] == [apart.tokens(i) for i in range(4)]
    assert desk.engine.stats().prefix_cache_hits == 3 * 96


def test_the_answer_says_how_many_prompt_tokens_were_there(desks: Desks) -> None:
    desk = desks(tiny_llama())
    assert cached_tokens(desk, PREFIX) == 0
    assert cached_tokens(desk, [*PREFIX, 1]) == 96
    assert cached_tokens(desk, PREFIX, prompt_logprobs=0) == 0, "its scores need every position computed"
    assert cached_tokens(desks(tiny_llama(), prefix_cache=False), PREFIX) == 0


def test_a_beginning_that_was_no_number_is_never_handed_on(desks: Desks) -> None:
    model = tiny_llama()
    with torch.no_grad():
        model.model.embed_tokens.weight[99] = float("nan")
    desk = desks(model)
    poisoned = [*PREFIX[:40], 99, *PREFIX[40:]]
    assert desk.ask(poisoned, max_tokens=1).failure is not None
    assert cached_tokens(desk, PREFIX) == 0


def test_where_positions_depend_on_the_length_nothing_is_reused(desks: Desks) -> None:
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    desk = desks(tiny_llama(rope_parameters=rope))
    assert not desk.engine.settings.prefix_cache
    assert [cached_tokens(desk, PREFIX) for _ in range(2)] == [0, 0]
