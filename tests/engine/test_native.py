"""The lean step against transformers' own forward pass, and against itself in other company."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import (
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from serve.kernels import unavailable
from tests.engine.conftest import Answered, Desk, tiny_llama
from tests.engine.test_witness import Seen, watch

Desks = Callable[..., Desk]
pytestmark = pytest.mark.skipif(unavailable() is not None, reason=f"no kernels: {unavailable()}")

SIZES = {
    "vocab_size": 259,
    "hidden_size": 128,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 512,
    "initializer_range": 0.1,
    "bos_token_id": 256,
    "eos_token_id": 257,
    "pad_token_id": 258,
}


def bf16(model: Any) -> Any:
    return model.eval().bfloat16()


def llama(**changes: Any) -> LlamaForCausalLM:
    return bf16(tiny_llama(**{**SIZES, **changes}))


MODELS: dict[str, Callable[[], Any]] = {
    "llama": llama,
    "llama, narrow heads": lambda: llama(head_dim=24),
    "llama, tied": lambda: llama(tie_word_embeddings=True),
    "llama, scaled positions": lambda: llama(
        rope_parameters={
            "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
        }
    ),
    "mistral, window 24": lambda: bf16(MistralForCausalLM(MistralConfig(**SIZES, sliding_window=24))),
    "qwen2, with biases": lambda: bf16(Qwen2ForCausalLM(Qwen2Config(**SIZES))),
    "qwen3, heads normalized": lambda: bf16(Qwen3ForCausalLM(Qwen3Config(**SIZES))),
}  # fmt: skip


def prompt_of(length: int, seed: int = 0) -> list[int]:
    return torch.randint(0, 256, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def scored(desk: Desk, prompt: list[int]) -> list[float]:
    """The log-probability of every prompt token but the first."""
    answer = desk.ask(prompt, max_tokens=0, prompt_logprobs=0)
    assert answer.prompt is not None
    return [entry.logprob for entry in answer.prompt.logprobs if entry is not None]


def exact_scores(model: Any, prompt: list[int]) -> torch.Tensor:
    model = copy.deepcopy(model).float()
    model.set_attn_implementation("eager")
    with torch.inference_mode():
        logprobs = model(torch.tensor([prompt])).logits[0].log_softmax(-1)
    return logprobs[:-1].gather(-1, torch.tensor(prompt[1:])[:, None])[:, 0]


@pytest.mark.parametrize("name", MODELS)
def test_a_covered_model_scores_text_as_transformers_does_in_fp32(name: str, desks: Desks) -> None:
    torch.manual_seed(0)
    model = MODELS[name]()
    prompt = prompt_of(150)
    expected = exact_scores(model, prompt)
    plain = torch.tensor(scored(desks(copy.deepcopy(model), native=False), prompt))
    desk = desks(model)
    assert desk.engine.path == "native path"
    native = torch.tensor(scored(desk, prompt))
    assert float((native - expected).abs().mean()) <= 1.2 * float((plain - expected).abs().mean()) + 1e-3


def heard(answer: Answered) -> list[tuple[int, float]]:
    return [(entry.token_id, entry.logprob) for delta in answer.deltas[0] for entry in delta.logprobs]


def test_an_answer_is_the_same_to_the_last_bit_in_any_company_chunking_and_after_preemption(desks: Desks) -> None:
    model = llama()
    prompt, wanted = prompt_of(90), {"max_tokens": 40, "ignore_eos": True, "logprobs": 0}
    alone = heard(desks(copy.deepcopy(model)).ask(prompt, **wanted))
    assert len(alone) == 40
    for settings in (
        {},
        {"max_num_batched_tokens": 16, "max_num_seqs": 8},
        {"kv_cache_bytes": 8 * 32 * 3 * 2 * 2 * 64},
    ):
        desk = desks(copy.deepcopy(model), **{"max_num_seqs": 16, "max_model_len": 200, **settings})
        others = [desk.submit(prompt_of(5 + 9 * i, seed=i), max_tokens=30, ignore_eos=True) for i in range(15)]
        assert heard(desk.ask(prompt, **wanted)) == alone
        desk.wait(*others)
        assert (desk.engine.stats().preemptions > 0) == ("kv_cache_bytes" in settings)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"head_dim": 264}, "more than 256 wide"),
        ({"hidden_act": "gelu"}, "not SiLU"),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "changes with the length"),
    ],
)
def test_what_is_not_covered_stays_on_the_plain_path_and_says_why(
    changes: dict[str, Any], reason: str, desks: Desks
) -> None:
    desk = desks(llama(**changes))
    assert desk.engine.path.startswith("plain path")
    assert reason in desk.engine.path
    assert len(desk.ask(prompt_of(9), max_tokens=5, ignore_eos=True).tokens()) == 5


def test_fp32_stays_on_the_plain_path(desks: Desks) -> None:
    assert "not in bf16" in desks(tiny_llama()).engine.path


def test_a_dense_weight_is_not_held_twice(desks: Desks) -> None:
    model = llama()
    desks(model)
    linears = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
    assert all(linear.weight.numel() == 0 for linear in linears)


def test_hidden_states_that_are_handed_out_make_the_very_logits_that_were_served(desks: Desks) -> None:
    desk = desks(llama(tie_word_embeddings=True))
    assert desk.engine.path == "native path"
    head = desk.engine.head
    assert head is not None
    hidden, logits = Seen("hidden"), Seen("prompt_logits")
    text = prompt_of(70)
    for name, witness in (("hidden", hidden), ("logits", logits)):
        watch(desk, name, text, witness, max_tokens=0)
    desk.wait("hidden", "logits")
    assert hidden.positions == list(range(70))
    assert torch.equal(head.project(hidden.all()[:69]), logits.all())


def test_the_native_choice_is_the_likeliest_token_and_fails_only_those_whose_logits_are_not_finite(
    desks: Desks,
) -> None:
    model = llama(vocab_size=1100)
    model.model.embed_tokens.weight.data[99] = float("nan")
    desk = desks(model, max_num_seqs=8)
    assert desk.engine.path == "native path"
    good = [
        desk.submit([token % 99 for token in prompt_of(20 + i, seed=i)], max_tokens=9, ignore_eos=True, logprobs=0)
        for i in (1, 2)
    ]
    bad = desk.submit([1, 99, 2], max_tokens=9, logprobs=0)
    answers = desk.wait(*good, bad)
    assert answers[-1].failure is not None
    for answer in answers[:-1]:
        assert [entry.rank for delta in answer.deltas[0] for entry in delta.logprobs] == [1] * 9
