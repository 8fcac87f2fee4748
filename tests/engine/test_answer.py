"""What comes back: log-probabilities, ends, texts and order of events, through a whole engine."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from serve.generation import TokenLogprob
from tests.engine.conftest import Answered, Desk, byte_tokenizer, greedy, tiny_llama

Desks = Callable[..., Desk]
PROMPT = [10, 20, 30, 40, 50, 60, 70]


def raw_logprobs(model: Any, tokens: list[int]) -> torch.Tensor:
    """[tokens, vocab]: the model's own log-probabilities of what follows each token."""
    model.set_attn_implementation("eager")
    with torch.no_grad():
        logprobs = model(torch.tensor([tokens]), use_cache=False).logits[0].log_softmax(-1)
    model.set_attn_implementation("halftone_paged")
    return logprobs


def reported(answer: Answered) -> list[TokenLogprob]:
    return [entry for delta in answer.deltas[0] for entry in delta.logprobs]


def test_logprobs_are_of_the_raw_distribution_whatever_the_sampling(desks: Desks) -> None:
    model = tiny_llama()
    desk = desks(model)
    answer = desk.ask(
        PROMPT, temperature=0.7, top_k=5, seed=3, presence_penalty=1.0, max_tokens=8, logprobs=4, ignore_eos=True
    )
    raw = raw_logprobs(model, PROMPT + answer.tokens())[len(PROMPT) - 1 : -1]
    for token, entry, row in zip(answer.tokens(), reported(answer), raw, strict=True):
        assert entry.token_id == token
        assert entry.logprob == pytest.approx(float(row[token]), abs=1e-4)
        assert [top.token_id for top in entry.top] == row.topk(4).indices.tolist()
        assert [top.rank for top in entry.top] == [1, 2, 3, 4]


def test_requests_with_and_without_logprobs_share_a_step(desks: Desks) -> None:
    desk = desks(tiny_llama())
    plain, told = desk.submit(PROMPT, max_tokens=5), desk.submit(PROMPT, max_tokens=5, logprobs=0)
    silent, speaking = desk.wait(plain, told)
    assert reported(silent) == []
    assert [entry.token_id for entry in reported(speaking)] == speaking.tokens() == silent.tokens()
    assert all(entry.top == () for entry in reported(speaking))


@pytest.mark.parametrize("chunk", [3, 512])
def test_a_prompt_is_scored_without_generating(desks: Desks, chunk: int) -> None:
    model = tiny_llama()
    desk = desks(model, max_num_seqs=2, max_num_batched_tokens=chunk)
    answer = desk.ask(PROMPT, max_tokens=0, prompt_logprobs=2)
    assert (answer.tokens(), answer.last().finish_reason) == ([], "length")
    assert answer.prompt is not None
    assert answer.prompt.text == byte_tokenizer().decode(PROMPT)
    first, *rest = answer.prompt.logprobs
    assert first is None
    raw = raw_logprobs(model, PROMPT)
    for position, entry in enumerate(rest):
        assert entry is not None
        assert entry.token_id == PROMPT[position + 1]
        assert entry.logprob == pytest.approx(float(raw[position, PROMPT[position + 1]]), abs=1e-4)
        assert len(entry.top) == 2
    assert len(rest) == len(PROMPT) - 1


def test_a_scored_prompt_survives_preemption_and_opens_the_answer_of_every_choice(desks: Desks) -> None:
    model = tiny_llama()
    desk = desks(model, block_size=4, max_model_len=48, kv_cache_bytes=52 * 512)
    asked = [
        desk.submit([*PROMPT, index], n=2, max_tokens=20, prompt_logprobs=0, ignore_eos=True) for index in range(6)
    ]
    for index, answer in enumerate(desk.wait(*asked)):
        assert answer.prompt is not None
        assert [e.token_id for e in answer.prompt.logprobs if e] == [*PROMPT[1:], index]
        assert len(answer.tokens(0)) == len(answer.tokens(1)) == 20
    assert desk.engine.stats().preemptions > 0


def test_a_prompt_of_one_token_has_no_scores(desks: Desks) -> None:
    answer = desks(tiny_llama()).ask([5], max_tokens=0, prompt_logprobs=0)
    assert answer.prompt is not None
    assert answer.prompt.logprobs == (None,)


def test_the_end_token_ends_without_a_reason_and_a_stop_token_with_its_id(desks: Desks) -> None:
    model = tiny_llama()
    told = greedy(model, PROMPT, 12)
    stop = told[5]
    before = told.index(stop)
    desk = desks(model)
    by_id = desk.ask(PROMPT, max_tokens=12, stop_token_ids=(stop,))
    assert by_id.tokens() == told[: before + 1]
    assert (by_id.last().finish_reason, by_id.last().stop_reason) == ("stop", stop)
    model.generation_config.eos_token_id = stop
    by_end = desks(model).ask(PROMPT, max_tokens=12)
    assert by_end.tokens() == told[: before + 1]
    assert (by_end.last().finish_reason, by_end.last().stop_reason) == ("stop", None)
    assert by_end.text() == by_id.text()
    ignored = desks(model).ask(PROMPT, max_tokens=12, ignore_eos=True)
    assert (ignored.tokens(), ignored.last().finish_reason) == (told, "length")


def test_min_tokens_holds_the_end_back(desks: Desks) -> None:
    model = tiny_llama()
    stop = greedy(model, PROMPT, 1)[0]
    answer = desks(model).ask(PROMPT, max_tokens=12, min_tokens=4, stop_token_ids=(stop,))
    assert stop not in answer.tokens()[:4]
    assert len(answer.tokens()) >= 5


def ascii_only(model: Any) -> dict[int, float]:
    """A bias that keeps a random model to single-byte characters."""
    return {token: -100.0 for token in range(259) if not 0 < token < 94}


def test_a_stop_string_across_tokens_cuts_the_text_and_ends_the_choice(desks: Desks) -> None:
    desk = desks(tiny_llama())
    bias = ascii_only(desk)
    whole = desk.ask(PROMPT, max_tokens=20, logit_bias=bias, ignore_eos=True).text()
    stop = whole[6:9]
    at = whole.index(stop)
    cut = desk.ask(PROMPT, max_tokens=20, logit_bias=bias, stop=("never", stop))
    assert cut.text() == whole[:at]
    assert (cut.last().finish_reason, cut.last().stop_reason) == ("stop", stop)
    kept = desk.ask(PROMPT, max_tokens=20, logit_bias=bias, stop=(stop,), include_stop_str_in_output=True)
    assert kept.text() == whole[: at + 3]


def test_text_held_back_for_a_stop_string_comes_out_at_the_end(desks: Desks) -> None:
    desk = desks(tiny_llama())
    bias = ascii_only(desk)
    whole = desk.ask(PROMPT, max_tokens=10, logit_bias=bias, ignore_eos=True).text()
    held = desk.ask(PROMPT, max_tokens=10, logit_bias=bias, ignore_eos=True, stop=(whole[-2:] + "\x01",))
    assert held.text() == whole
    assert held.last().finish_reason == "length"


def test_a_real_model_tells_the_story_that_generate_tells(desks: Desks, shared: Path) -> None:
    folder = shared / "models" / "TinyStories-656K"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompt = list(tokenizer("Once upon a time, there was a little girl")["input_ids"])
    expected = greedy(model, prompt, 120)
    desk = desks(model, tokenizer)
    answer = desk.ask(prompt, max_tokens=120, logprobs=0)
    assert answer.tokens() == expected
    # The text goes on from the prompt, spaces included.
    whole = tokenizer.decode(prompt + expected, skip_special_tokens=True)
    assert tokenizer.decode(prompt, skip_special_tokens=True) + answer.text() == whole
    nats = -sum(entry.logprob for entry in reported(answer)) / len(expected)
    assert nats < math.log(8), "a model that knows its language is rarely surprised"
    joined = b"".join(bytes(entry.bytes) for entry in reported(answer)).decode()
    assert joined.strip() == answer.text().strip()
