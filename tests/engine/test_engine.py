from __future__ import annotations

import gc
import threading
from collections.abc import Callable
from typing import Any

import psutil
import pytest
import torch

from serve.errors import ContextLengthExceeded, InvalidRequest, Overloaded, VariantUnavailable
from serve.generation import GenerationRequest, SamplingParams
from tests.engine.conftest import Desk, greedy, tiny_llama

Desks = Callable[..., Desk]


def prompts(count: int, lengths: tuple[int, int] = (3, 60), seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.randint(*lengths, (count,), generator=generator).tolist()
    return [torch.randint(0, 256, (size,), generator=generator).tolist() for size in sizes]


def test_greedy_equals_generate_alone(desks: Desks) -> None:
    model = tiny_llama()
    prompt = prompts(1)[0]
    expected = greedy(model, prompt, 40)
    assert desks(model).ask(prompt, max_tokens=40).tokens() == expected


@pytest.mark.parametrize("chunk", [4, 17, 512])
def test_greedy_equals_generate_in_a_batch_with_any_chunk_size(desks: Desks, chunk: int) -> None:
    model = tiny_llama()
    asked = prompts(12)
    expected = [greedy(model, prompt, 20) for prompt in asked]
    desk = desks(
        model,
        max_num_seqs=4,
        max_num_batched_tokens=chunk,
        max_prefill_tokens_beside_decode=max(chunk // 2, 1),
        block_size=4,
    )
    answers = desk.wait(*[desk.submit(prompt, max_tokens=20) for prompt in asked])
    assert [answer.tokens() for answer in answers] == expected


def test_twenty_requests_in_the_blocks_of_one_are_preempted_and_still_equal_generate(desks: Desks) -> None:
    model = tiny_llama()
    asked = prompts(20, (20, 40))
    expected = [greedy(model, prompt, 40) for prompt in asked]
    needed_tokens = 80 * 11 // 10
    bytes_per_token = 2 * 2 * 8 * 2 * 4  # layers, heads, head size, keys and values, fp32
    desk = desks(model, block_size=4, max_model_len=80, kv_cache_bytes=needed_tokens * bytes_per_token)
    answers = desk.wait(*[desk.submit(prompt, max_tokens=40) for prompt in asked])
    assert [answer.tokens() for answer in answers] == expected
    assert desk.engine.stats().preemptions > 0
    assert desk.engine.stats().kv_blocks_used == 0


def sampled(desk: Desk, prompt: list[int], neighbours: int) -> list[int]:
    others = [
        desk.submit(other, temperature=1.3, seed=index, max_tokens=30)
        for index, other in enumerate(prompts(neighbours, seed=9))
    ]
    asked = desk.submit(prompt, temperature=1.0, top_p=0.95, seed=1234, max_tokens=30)
    desk.wait(*others)
    return desk.wait(asked)[0].tokens()


def test_a_seeded_request_gives_the_same_tokens_beside_any_neighbours(desks: Desks) -> None:
    desk = desks(tiny_llama())
    prompt = prompts(1, seed=5)[0]
    alone = sampled(desk, prompt, 0)
    assert sampled(desk, prompt, 3) == alone
    assert sampled(desk, prompt, 15) == alone
    assert len(set(alone)) > 5


def test_a_seeded_request_is_unmoved_by_preemption(desks: Desks) -> None:
    model = tiny_llama()
    prompt = prompts(1, seed=5)[0]
    alone = sampled(desks(model), prompt, 0)
    cramped = desks(model, block_size=4, max_model_len=100, kv_cache_bytes=120 * 512)
    assert sampled(cramped, prompt, 15) == alone
    assert cramped.engine.stats().preemptions > 0


def test_choices_differ_by_noise_and_the_first_is_the_request_alone(desks: Desks) -> None:
    desk = desks(tiny_llama())
    prompt = prompts(1)[0]
    many = desk.ask(prompt, n=3, temperature=1.0, seed=7, max_tokens=20)
    one = desk.ask(prompt, temperature=1.0, seed=7, max_tokens=20)
    assert many.tokens(0) == one.tokens()
    assert len({tuple(many.tokens(choice)) for choice in range(3)}) == 3


def test_two_hundred_requests_of_mixed_length_all_finish_right_and_leave_nothing(desks: Desks) -> None:
    model = tiny_llama()
    asked = prompts(200, (1, 100), seed=3)
    lengths = [1 + index % 23 for index in range(200)]
    desk = desks(model, max_num_seqs=32, kv_cache_bytes=2**20)
    answers = desk.wait(
        *[desk.submit(prompt, max_tokens=length) for prompt, length in zip(asked, lengths, strict=True)]
    )
    for answer, length in zip(answers, lengths, strict=True):
        assert len(answer.tokens()) == length or answer.last().finish_reason == "stop"
    for index in range(0, 200, 20):
        expected = greedy(model, asked[index], lengths[index])
        assert answers[index].tokens() == expected
    stats = desk.engine.stats()
    assert (stats.running, stats.waiting, stats.kv_blocks_used) == (0, 0, 0)
    assert desk.engine._core.is_idle


def test_every_step_reaches_the_sink_in_one_call(desks: Desks) -> None:
    desk = desks(tiny_llama())
    desk.wait(*[desk.submit(prompt, max_tokens=10, ignore_eos=True) for prompt in prompts(8)])
    assert len(desk.batches) <= desk.engine.stats().steps
    assert max(len(batch) for batch in desk.batches) >= 8


def test_an_abort_frees_the_blocks_and_ends_the_request(desks: Desks) -> None:
    desk = desks(tiny_llama())
    asked = desk.submit(prompts(1)[0], max_tokens=150, ignore_eos=True)
    desk.wait_until(lambda: len(desk.answers[asked].deltas[0]) > 2)
    desk.engine.abort(asked)
    (answer,) = desk.wait(asked)
    assert answer.last().finish_reason == "abort"
    assert len(answer.tokens()) < 150
    assert desk.engine.stats().kv_blocks_used == 0


def test_an_abort_before_the_first_step_ends_a_waiting_request(desks: Desks) -> None:
    desk = desks(tiny_llama(), max_num_seqs=1, max_num_batched_tokens=8)
    first = desk.submit(prompts(1)[0], max_tokens=100, ignore_eos=True)
    second = desk.submit(prompts(1)[0], max_tokens=100)
    desk.engine.abort(second)
    (answer,) = desk.wait(second)
    assert (answer.last().finish_reason, answer.tokens()) == ("abort", [])
    desk.engine.abort(first)


def test_aborting_what_is_unknown_does_nothing(desks: Desks) -> None:
    desk = desks(tiny_llama())
    desk.engine.abort("nobody")
    assert desk.ask([1, 2, 3], max_tokens=2).tokens()


def test_a_failing_step_fails_its_requests_and_the_engine_goes_on(desks: Desks) -> None:
    model = tiny_llama()
    expected = greedy(model, [1, 2, 3], 5)
    desk = desks(model)
    fine = model.lm_head.forward

    def broken(x: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("out of memory")

    model.lm_head.forward = broken
    answer = desk.ask([1, 2, 3], max_tokens=5)
    assert answer.failure is not None
    assert answer.failure.error.code == "generation_failed"
    assert "out of memory" not in answer.failure.error.message

    def starved(x: torch.Tensor) -> torch.Tensor:
        return x.new_empty(2**60)

    model.lm_head.forward = starved
    answer = desk.ask([1, 2, 3], max_tokens=5)
    assert answer.failure is not None
    assert answer.failure.error.code == "out_of_memory"
    model.lm_head.forward = fine
    assert desk.ask([1, 2, 3], max_tokens=5).tokens() == expected
    assert desk.engine.stats().kv_blocks_used == 0


def test_logits_that_are_no_numbers_fail_only_their_request(desks: Desks) -> None:
    model = tiny_llama()
    expected = greedy(model, [1, 2, 3], 8)
    with torch.no_grad():
        model.model.embed_tokens.weight[99] = float("nan")
    desk = desks(model)
    poisoned, healthy = desk.submit([1, 99, 3], max_tokens=8), desk.submit([1, 2, 3], max_tokens=8)
    sick, well = desk.wait(poisoned, healthy)
    assert sick.failure is not None
    assert sick.failure.error.code == "output_not_finite"
    assert well.tokens() == expected
    # The next owner of the poisoned blocks reads zeros, not what was left in them.
    assert desk.ask([1, 2, 3], max_tokens=8).tokens() == expected


def test_what_comes_in_faster_than_the_queue_holds_is_refused(desks: Desks) -> None:
    desk = desks(tiny_llama(), max_num_seqs=1, max_num_batched_tokens=4, max_queue=2)
    submitted = []
    with pytest.raises(Overloaded) as refused:
        submitted += [desk.submit([1, 2, 3], max_tokens=100, ignore_eos=True) for _ in range(9)]
    assert refused.value.retry_after_s is not None


@pytest.mark.parametrize(
    ("prompt", "params", "error", "field"),
    [
        ([], {}, InvalidRequest, "prompt"),
        ([259], {}, InvalidRequest, "prompt"),
        ([-1], {}, InvalidRequest, "prompt"),
        ([1], {"logit_bias": {999: 1.0}}, InvalidRequest, "logit_bias"),
        ([1] * 256, {}, ContextLengthExceeded, "prompt"),
        ([1] * 200, {"max_tokens": 57}, ContextLengthExceeded, "max_tokens"),
    ],
)
def test_bad_requests_name_their_field(
    desks: Desks, prompt: list[int], params: dict[str, Any], error: type[Exception], field: str
) -> None:
    with pytest.raises(error) as caught:
        desks(tiny_llama()).submit(prompt, **params)
    assert caught.value.param == field


def test_closing_ends_every_open_request(desks: Desks) -> None:
    desk = desks(tiny_llama())
    asked = [desk.submit(prompt, max_tokens=150, ignore_eos=True) for prompt in prompts(4)]
    desk.engine.close()
    for answer in desk.wait(*asked):
        assert answer.failure is not None
        assert isinstance(answer.failure.error, VariantUnavailable)
    with pytest.raises(VariantUnavailable):
        desk.submit([1, 2, 3])


def test_draining_finishes_what_was_accepted(desks: Desks) -> None:
    desk = desks(tiny_llama())
    asked = [desk.submit(prompt, max_tokens=20, ignore_eos=True) for prompt in prompts(4)]
    desk.engine.close(drain=True, timeout_s=60)
    assert [len(answer.tokens()) for answer in desk.wait(*asked)] == [20] * 4


def test_timing_is_told_with_the_last_delta(desks: Desks) -> None:
    timing = desks(tiny_llama()).ask([1, 2, 3], max_tokens=5, ignore_eos=True).last().timing
    assert timing is not None
    assert 0 <= timing.queue_s <= timing.first_token_s <= timing.total_s
    assert timing.running_sequences == 1


def test_a_long_prompt_does_not_stall_those_who_are_being_answered(desks: Desks) -> None:
    desk = desks(tiny_llama(), max_num_seqs=8, max_num_batched_tokens=64, max_prefill_tokens_beside_decode=8)
    speaking = desk.submit([1, 2, 3], max_tokens=100, ignore_eos=True)
    desk.wait_until(lambda: len(desk.answers[speaking].deltas[0]) > 3)
    long = desk.submit([5] * 200, max_tokens=1)
    desk.wait(speaking, long)
    steps = [{event.request_id for event in batch} for batch in desk.batches]
    arrived = next(index for index, requests in enumerate(steps) if long in requests)
    # 200 prompt tokens in chunks of 8: while they were computed, every step still gave the other its token.
    assert arrived > 20
    assert all(speaking in requests for requests in steps[:arrived])


def test_the_sampled_text_of_a_request_is_reproduced_by_another_engine(desks: Desks) -> None:
    asked = {"temperature": 0.9, "top_k": 40, "min_p": 0.01, "repetition_penalty": 1.2, "seed": 42, "max_tokens": 25}
    texts = [desks(tiny_llama()).ask([9, 8, 7], **asked).tokens() for _ in range(2)]
    assert texts[0] == texts[1]


def test_a_sink_that_fails_does_not_stop_the_engine(desks: Desks, caplog: pytest.LogCaptureFixture) -> None:
    desk = desks(tiny_llama())
    working, failed = desk.engine._sink, threading.Event()

    def failing(events: list[Any]) -> None:
        desk.engine._sink = working
        failed.set()
        raise RuntimeError("the loop is closed")

    desk.engine._sink = failing
    desk.engine.submit(GenerationRequest("lost", (1, 2, 3), SamplingParams(max_tokens=1)))
    assert failed.wait(30)
    assert desk.ask([1, 2, 3], max_tokens=2).tokens()
    assert "the sink refused" in caplog.text
    assert desk.engine.is_alive


def test_memory_is_flat_once_the_cache_is_in_use(desks: Desks) -> None:
    desk, process = desks(tiny_llama(), kv_cache_bytes=2**20), psutil.Process()

    def serve_many() -> int:
        asked = [desk.submit(prompt, max_tokens=8) for prompt in prompts(60)]
        desk.wait(*asked)
        desk.batches.clear()
        for request_id in asked:
            del desk.answers[request_id]
        gc.collect()
        return process.memory_info().rss

    for _ in range(2):
        warm = serve_many()
    for _ in range(3):
        after = serve_many()
    assert after - warm < 8 * 2**20
