"""Tiny models with random weights, a tokenizer without files, and an engine whose answers can be awaited."""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from serve.engine import Engine, EngineSettings
from serve.generation import Delta, Event, Failure, GenerationRequest, PromptDelta, SamplingParams

VOCABULARY = 259  # 256 bytes and three special tokens


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Every byte is a token, so any text round-trips and most characters need several tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {character: index for index, character in enumerate(alphabet)}
    vocabulary |= {"<s>": 256, "</s>": 257, "<pad>": 258}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


def tiny_llama(seed: int = 0, **changes: Any) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        **{
            "vocab_size": VOCABULARY,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 256,
            "initializer_range": 0.3,
            "bos_token_id": 256,
            "eos_token_id": 257,
            "pad_token_id": 258,
        }
        | changes
    )
    return LlamaForCausalLM(config).eval()


@dataclass
class Answered:
    """What came back for one request."""

    prompt: PromptDelta | None = None
    deltas: dict[int, list[Delta]] = field(default_factory=lambda: defaultdict(list))
    failure: Failure | None = None

    def tokens(self, choice: int = 0) -> list[int]:
        return [token for delta in self.deltas[choice] for token in delta.token_ids]

    def text(self, choice: int = 0) -> str:
        return "".join(delta.text for delta in self.deltas[choice])

    def last(self, choice: int = 0) -> Delta:
        return self.deltas[choice][-1]


class Desk:
    """An engine with a sink that sorts events by request, and fails on any that comes out of turn."""

    def __init__(self, model: Any, tokenizer: Any = None, **settings: Any) -> None:
        self.answers: dict[str, Answered] = {}
        self.batches: list[list[Event]] = []
        self._choices: dict[str, int] = {}
        self._changed = threading.Condition()
        self.engine = Engine(model, tokenizer or byte_tokenizer(), EngineSettings(**settings), self._sink)
        self.engine.start()

    def submit(self, prompt: list[int], request_id: str | None = None, n: int = 1, **params: Any) -> str:
        request_id = request_id or f"request-{len(self._choices)}"
        self._choices[request_id] = n
        self.answers[request_id] = Answered()
        sampling = replace(SamplingParams(temperature=0.0), **params)
        self.engine.submit(GenerationRequest(request_id, tuple(prompt), sampling, n=n))
        return request_id

    def wait(self, *request_ids: str, timeout_s: float = 60.0) -> list[Answered]:
        with self._changed:
            assert self._changed.wait_for(lambda: all(self._done(r) for r in request_ids), timeout_s), "no answer"
        return [self.answers[request_id] for request_id in request_ids]

    def wait_until(self, condition: Callable[[], bool], timeout_s: float = 30.0) -> None:
        with self._changed:
            assert self._changed.wait_for(condition, timeout_s), "it never came true"

    def ask(self, prompt: list[int], n: int = 1, **params: Any) -> Answered:
        return self.wait(self.submit(prompt, n=n, **params))[0]

    def _sink(self, events: list[Event]) -> None:
        with self._changed:
            self.batches.append(events)
            for event in events:
                self._take(event)
            self._changed.notify_all()

    def _take(self, event: Event) -> None:
        answer = self.answers[event.request_id]
        if isinstance(event, PromptDelta):
            assert answer.prompt is None, "a prompt is told once"
            answer.prompt = event
        elif isinstance(event, Failure):
            answer.failure = event
        else:
            assert answer.prompt is not None, "the prompt comes first"
            past = answer.deltas[event.choice_index]
            assert not past or past[-1].finish_reason is None, "nothing follows the end"
            past.append(event)

    def _done(self, request_id: str) -> bool:
        answer = self.answers[request_id]
        ended = [c for c in answer.deltas.values() if c and c[-1].finish_reason is not None]
        return answer.failure is not None or len(ended) == self._choices[request_id]


@pytest.fixture
def desks() -> Iterator[Callable[..., Desk]]:
    """Opens engines and closes them after the test."""
    opened: list[Desk] = []

    def open_desk(model: Any, tokenizer: Any = None, **settings: Any) -> Desk:
        opened.append(Desk(model, tokenizer, **settings))
        return opened[-1]

    yield open_desk
    for desk in opened:
        desk.engine.close()


def greedy(model: Any, prompt: list[int], count: int, *, use_cache: bool = True) -> list[int]:
    """What transformers' own `generate` answers, with its plainest attention."""
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    ids = torch.tensor([prompt])
    options = {"max_new_tokens": count, "do_sample": False, "use_cache": use_cache}
    output = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
    model.set_attn_implementation(before)
    return output[0, len(prompt) :].tolist()
