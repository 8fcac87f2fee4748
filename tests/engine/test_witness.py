"""What a witness sees is what the engine computed for the client, once per position, and no user waits for it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from serve.engine.witness import Wanted
from serve.generation import Delta, Event, GenerationRequest, SamplingParams
from tests.engine.conftest import Answered, Desk, tiny_llama

Desks = Callable[..., Desk]
PROMPT = [72, 101, 108, 108, 111, 32, 119]


@dataclass
class Seen:
    wants: Wanted
    first: int = 0
    positions: list[int] = field(default_factory=list)
    rows: list[Tensor] = field(default_factory=list)

    def see(self, position: int, rows: Tensor) -> None:
        self.positions += range(position, position + len(rows))
        self.rows.append(rows.clone())

    def all(self) -> Tensor:
        return torch.cat(self.rows)


def watch(desk: Desk, name: str, prompt: list[int], witness: Any, **params: Any) -> str:
    request = GenerationRequest(name, tuple(prompt), SamplingParams(**{"temperature": 0.0, **params}))
    desk._choices[name] = 1
    desk.answers[name] = Answered()
    desk.engine.submit(request, witness)
    return name


@pytest.fixture(params=["fp32", "bf16"])
def model(request: pytest.FixtureRequest) -> Any:
    made = tiny_llama()
    return made if request.param == "fp32" else made.bfloat16()


def test_kept_hidden_states_and_the_head_give_the_logits_that_were_served(desks: Desks, model: Any) -> None:
    desk = desks(model, native=False)
    seen, logits = Seen("hidden"), Seen("logits")
    watch(desk, "a", PROMPT, seen, max_tokens=12, ignore_eos=True)
    watch(desk, "b", PROMPT, logits, max_tokens=12, ignore_eos=True)
    desk.wait("a", "b")
    head = desk.engine.head
    assert head is not None
    assert seen.positions == list(range(len(PROMPT) + 11))
    assert logits.positions == list(range(len(PROMPT) - 1, len(PROMPT) + 11))
    served = head.project(seen.all()[len(PROMPT) - 1 :]).to(head.logits_dtype).float()
    torch.testing.assert_close(served, logits.all(), rtol=1e-2, atol=1e-2 if head.dtype == torch.bfloat16 else 1e-5)


def test_every_position_is_shown_once_also_after_a_preemption(desks: Desks) -> None:
    model = tiny_llama()
    # Room for both prompts, not for both answers: the younger one is preempted and computed again.
    desk = desks(model, block_size=4, kv_cache_bytes=4 * 14 * 256, max_model_len=48)
    alone = desks(model).ask(PROMPT, max_tokens=30, ignore_eos=True).tokens()
    first, second = Seen("hidden"), Seen("hidden")
    watch(desk, "a", PROMPT, first, max_tokens=30, ignore_eos=True)
    watch(desk, "b", PROMPT, second, max_tokens=30, ignore_eos=True)
    answers = desk.wait("a", "b")
    assert desk.engine.stats().preemptions > 0
    assert [answer.tokens() for answer in answers] == [alone, alone]
    for seen in (first, second):
        assert seen.positions == list(range(len(PROMPT) + 29))
    torch.testing.assert_close(first.all(), second.all(), rtol=1e-3, atol=1e-4)


def test_a_text_that_is_scored_shows_the_logits_of_the_wanted_positions(desks: Desks) -> None:
    desk = desks(tiny_llama(), max_num_batched_tokens=64)
    text = [(7 * index) % 256 for index in range(100)]
    seen = Seen("prompt_logits", first=10)
    watch(desk, "score", text, seen, max_tokens=0)
    told = desk.ask(text, max_tokens=0, prompt_logprobs=0)
    desk.wait("score")
    assert told.prompt is not None
    assert seen.positions == list(range(10, 99))
    expected = [entry.logprob for entry in told.prompt.logprobs[11:] if entry is not None]
    ours = seen.all().log_softmax(-1).gather(1, torch.tensor(text[11:])[:, None])[:, 0]
    torch.testing.assert_close(ours, torch.tensor(expected), rtol=1e-4, atol=1e-4)


def test_scoring_waits_until_no_user_waits(desks: Desks) -> None:
    desk = desks(tiny_llama(), max_num_seqs=2)
    order: list[str] = []
    done = threading.Event()
    inner = desk._sink

    def sink(events: list[Event]) -> None:
        order.extend(e.request_id for e in events if isinstance(e, Delta) and e.finish_reason)
        if "score" in order:
            done.set()
        inner(events)

    desk.engine._sink = sink
    seen = Seen("prompt_logits")
    users = [desk.submit(PROMPT, f"user-{index}", max_tokens=40, ignore_eos=True) for index in range(6)]
    watch(desk, "score", PROMPT * 4, seen, max_tokens=0)
    desk.wait(*users, "score")
    assert done.wait(10)
    # Two run at a time: only when the last two are running is nobody waiting.
    assert set(order[:4]) <= set(users)
    assert desk.engine.stats().waiting == 0


def test_a_witness_that_fails_harms_nobody(desks: Desks, caplog: pytest.LogCaptureFixture) -> None:
    class Bad(Seen):
        def see(self, position: int, rows: Tensor) -> None:
            raise RuntimeError("no")

    desk = desks(tiny_llama())
    expected = desk.ask(PROMPT, max_tokens=8, ignore_eos=True).tokens()
    watch(desk, "a", PROMPT, Bad("hidden"), max_tokens=8, ignore_eos=True)
    watch(desk, "b", PROMPT * 3, Bad("prompt_logits"), max_tokens=0)
    assert [answer.failure for answer in desk.wait("a", "b")] == [None, None]
    assert desk.answers["a"].tokens() == expected
    assert caplog.text.count("a witness failed") == 2


def test_capped_logits_and_compressed_heads_are_no_plain_product() -> None:
    from transformers import Gemma2Config, Gemma2ForCausalLM

    from serve.engine.architecture import adopt

    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    config = Gemma2Config(**sizes, **heads, final_logit_softcapping=0.05, pad_token_id=0)  # type: ignore[arg-type]
    capped, _ = adopt(Gemma2ForCausalLM(config).eval())
    assert capped.head is None
    plain, _ = adopt(tiny_llama())
    other, _ = adopt(tiny_llama())
    assert plain.head is not None
    assert other.head is not None
    assert plain.head.digest == other.head.digest
