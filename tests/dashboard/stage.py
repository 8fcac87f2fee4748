"""A server with nothing behind it: a `Backend` whose variants, traffic and answers a test sets as it likes.

What it counts goes through the server's own metrics, so the page reads what a real server would write. The answer of
every variant is `STORY`; a variant may say another word from some token on.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from serve import metrics
from serve.api import Call, ModelCard, ModelState
from serve.errors import ConfigError, UnknownModel, VariantUnavailable
from serve.generation import Delta, Disclosure, Event, GenerationRequest, Prompt, PromptDelta, Tokenized, TokenLogprob
from serve.metrics import Ledger, Recorder, VariantLabels
from serve.rollout import kl_guard_nats
from tests.dashboard.staged_rollouts import StagedRollouts

MODEL = "storyteller"
STORY = [
    " lived", " in", " a", " big", " tree", ".", " Every", " day", ",", " she", " looked", " for", " berries", " and",
    " nuts", " in", " the", " forest", ".",
]  # fmt: skip
MIB = 2**20


@dataclass
class Staged:
    """One variant: what it is, and how it answers."""

    name: str
    weight: float = 0.0
    state: ModelState = "ready"
    reason: str | None = None
    precision: str = ""
    bits: float = 16.0
    gap_s: float = 0.01
    other_words: Mapping[int, str] = field(default_factory=dict)
    """By position: what it says instead of `STORY`."""

    @property
    def labels(self) -> VariantLabels:
        return VariantLabels(MODEL, self.name, self.precision or self.name)

    @property
    def memory(self) -> dict[str, int]:
        stored = int(480 * MIB * self.bits / 16)
        scales = int(stored * 0.03) if self.bits < 16 else 0
        held = {"weights_resident": stored - scales, "quantization": scales, "kv_cache_resident": 64 * MIB}
        held |= {"allocator": 30 * MIB, "runtime": 300 * MIB}
        promised = {"weights": stored - scales, "kv_cache": 96 * MIB, "kv_cache_used": 24 * MIB}
        return held | promised | {"process": sum(held.values())}

    def says(self) -> list[str]:
        return [self.other_words.get(position, word) for position, word in enumerate(STORY)]


def default_variants() -> list[Staged]:
    return [
        Staged("bf16", 60.0, gap_s=0.014),
        Staged("int8", 20.0, bits=8.2, gap_s=0.009),
        Staged("nf4", 20.0, bits=4.5, gap_s=0.012, other_words={12: " food", 13: " with", 14: " friends"}),
        Staged("gptq4", 0.0, "failed", "recipe gptq4: the calibration text has 12 tokens; it needs 4096"),
    ]


class Stage:
    """Implements `serve.api.Backend`. Everything runs on the server's loop; tests write to it between requests."""

    def __init__(self) -> None:
        self.rollouts = StagedRollouts()
        self.reset()

    def reset(self) -> None:
        """`gate` holds tokens back, from position `gate_from` on, until it is set; `refusing` names a variant that
        turns calls away."""
        self.variants_ = {variant.name: variant for variant in default_variants()}
        self.recorder = Recorder()
        self.rollouts.reset()
        self.calls: list[Call] = []
        self.dealt: list[dict[str, float]] = []
        self.refusing: str | None = None
        self.gate: asyncio.Event | None = None
        self.gate_from = 0
        self.revision = 0
        for variant in self.variants_.values():
            self.recorder.declare(variant.labels, metrics.METRICS)

    def answered(self, name: str, requests: int = 1, tokens: int = 40) -> None:
        """Count answers of a variant as if clients had just read them."""
        variant, labels = self.variants_[name], self.variants_[name].labels
        for number in range(requests):
            slower = 1 + (number % 10) / 10
            first_s = 6 * variant.gap_s * slower
            self.recorder.observe(metrics.TTFT, labels, first_s)
            self.recorder.observe(metrics.ITL, labels, variant.gap_s * slower, tokens - 1)
            self.recorder.observe(metrics.E2E, labels, first_s + variant.gap_s * slower * (tokens - 1))
            self.recorder.add(metrics.GENERATION_TOKENS, labels, tokens)
            self.recorder.add(metrics.SUCCESS, labels, 1, "stop")

    def drifted(self, name: str, tokens: int, kl_nats: float, agreeing: int) -> None:
        """Score tokens that a variant served as if the reference had just read them."""
        labels = self.variants_[name].labels
        self.recorder.observe(metrics.DRIFT_KL, labels, kl_nats, tokens)
        self.recorder.add(metrics.DRIFT_TOKENS, labels, tokens)
        self.recorder.add(metrics.DRIFT_AGREEMENTS, labels, agreeing)
        self.recorder.add(metrics.DRIFT_SAMPLES, labels, 1, "scored")

    def sampled(self, name: str, result: str, answers: int = 1) -> None:
        """Answers that were drawn for scoring and came to nothing."""
        self.recorder.add(metrics.DRIFT_SAMPLES, self.variants_[name].labels, answers, result)

    def models(self) -> Sequence[ModelCard]:
        return [ModelCard(MODEL, "ready", context_length=512), *map(_card, self.variants_.values())]

    def ready(self) -> bool:
        return True

    async def start(self, call: Call) -> StagedAnswer:
        self.calls.append(call)
        name, _, pinned = call.model.partition("@")
        if name != MODEL or pinned not in ("", *self.variants_):
            raise UnknownModel(f"model {call.model!r} is not served here")
        variant = self.variants_[pinned or "bf16"]
        if variant.state != "ready":
            raise VariantUnavailable(f"variant {variant.name!r} is {variant.state}")
        if variant.name == self.refusing:
            raise VariantUnavailable(f"variant {variant.name!r} is saturated", retry_after_s=1)
        return StagedAnswer(self, variant, call)

    def refused(self, status: int) -> None:
        self.recorder.add(metrics.ERRORS, VariantLabels(MODEL, "", ""), 1, f"http_{status}")

    async def tokenize(self, model: str, prompt: Prompt, add_special_tokens: bool) -> Tokenized:
        assert not isinstance(prompt, str | tuple)
        return Tokenized((4, 5, 6), ("<user>", "Hi", "<assistant>"), 512)

    async def detokenize(self, model: str, ids: tuple[int, ...]) -> str:
        return "".join(map(_word, ids))

    async def metrics(self) -> str:
        for variant in self.variants_.values():
            if variant.state == "ready":
                self._gauges(variant)
        ledger = Ledger()
        ledger.update("stage", self.recorder.snapshot())
        return ledger.render()

    async def variants(self) -> Sequence[Mapping[str, Any]]:
        return [
            {"name": v.name, "precision": v.labels.precision, "state": v.state, "reason": v.reason, "weight": v.weight}
            | {"stage": "compress" if v.state == "loading" else "", "progress": 0.4, "load_report": None}
            for v in self.variants_.values()
        ]

    async def traffic(self) -> Mapping[str, Any]:
        weights = {v.name: v.weight for v in self.variants_.values()}
        return {"stable": "bf16", "weights": weights, "revision": self.revision}

    async def set_traffic(
        self, weights: Mapping[str, float], shadow: Mapping[str, float] | None = None
    ) -> Mapping[str, Any]:
        if sum(weights.values()) != 100:
            raise ConfigError("traffic.weights", f"must sum to 100, got {sum(weights.values()):g}")
        self.dealt.append(dict(weights))
        self.revision += 1
        for variant in self.variants_.values():
            variant.weight = weights.get(variant.name, 0.0)
        return await self.traffic()

    def change(self, name: str, **changes: Any) -> None:
        self.variants_[name] = replace(self.variants_[name], **changes)

    def _gauges(self, variant: Staged) -> None:
        labels = variant.labels
        for component, size in variant.memory.items():
            self.recorder.set(metrics.MEMORY, labels, size, component)
        self.recorder.set(metrics.BITS, labels, variant.bits)
        self.recorder.set(metrics.COMPRESSION, labels, 16 / variant.bits)
        self.recorder.set(metrics.PEAK_LOAD, labels, 1200 * MIB)
        self.recorder.set(metrics.LOAD, labels, 1.4, "compress")
        self.recorder.set(metrics.KV_USAGE, labels, 0.25)
        self.recorder.set(metrics.RUNNING, labels, 2)
        self.recorder.set(metrics.DRIFT_GUARD, labels, kl_guard_nats(variant.name))
        self.recorder.set(metrics.TRAFFIC_WEIGHT, labels, variant.weight / 100)


def _card(variant: Staged) -> ModelCard:
    precision = variant.labels.precision
    return ModelCard(f"{MODEL}@{variant.name}", variant.state, variant.name, precision, 512, "f", variant.reason)


class StagedAnswer:
    """Streams the variant's words; a call that asks for no tokens gets its prompt scored instead."""

    def __init__(self, stage: Stage, variant: Staged, call: Call) -> None:
        self.disclosure = Disclosure(variant.name, variant.labels.precision, "pinned", "f")
        self._stage = stage
        self._variant = variant
        self._call = call

    async def events(self) -> AsyncIterator[Event]:
        for request in self._call.requests:
            async for event in self._answer(request):
                yield event

    async def _answer(self, request: GenerationRequest) -> AsyncIterator[Event]:
        ids = request.prompt if isinstance(request.prompt, tuple) else (2, 3)
        scored = (None, *map(_scored, ids[1:])) if request.params.prompt_logprobs is not None else ()
        yield PromptDelta(request.request_id, ids, "".join(map(_word, ids)) if scored else "", scored)
        words = self._variant.says()[: request.params.max_tokens]
        if not words:
            yield Delta(request.request_id, 0, "", (), (), "length")
        for position, word in enumerate(words):
            if self._stage.gate is not None and position >= self._stage.gate_from:
                await self._stage.gate.wait()
            last = position == len(words) - 1
            token = _token(word, 0.95 if position % 5 else 0.35)
            yield Delta(request.request_id, 0, word, (token.token_id,), (token,), "length" if last else None)

    async def cancel(self) -> None:
        """Nothing runs by itself."""


def _token(word: str, probability: float) -> TokenLogprob:
    top = (TokenLogprob(1, " else", math.log((1 - probability) / 2), rank=2),)
    return TokenLogprob(_id(word), word, math.log(probability), tuple(word.encode()), 1, top)


_WORDS: list[str] = ["", "?", "Once upon", " a time", "<user>", "Hi", "<assistant>"]


def _id(word: str) -> int:
    if word not in _WORDS:
        _WORDS.append(word)
    return _WORDS.index(word)


def _word(token_id: int) -> str:
    return _WORDS[token_id] if token_id < len(_WORDS) else f"<{token_id}>"


def _scored(token_id: int) -> TokenLogprob:
    """The reference expects `STORY` and is surprised by anything else."""
    word = _word(token_id)
    if word in STORY:
        return TokenLogprob(token_id, word, math.log(0.8), tuple(word.encode()), 1)
    first = (TokenLogprob(1, " berries", math.log(0.7), rank=1),)
    return TokenLogprob(token_id, word, math.log(0.005), tuple(word.encode()), 9, first)
