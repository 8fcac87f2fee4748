"""What is asked for and what comes back: the vocabulary that the rim, the router, the replica and the engine share.

Standard library only, frozen, and cheap to send between processes. Nothing here knows HTTP, Ray or torch.
One HTTP call becomes one or more `GenerationRequest`s (one per prompt), each with `n` choices; the answer to each
is a stream of `Delta`s, opened by one `PromptDelta` and ended, choice by choice, by a `Delta` with a finish reason.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from serve.errors import HalftoneError

__all__ = [
    "Chat",
    "Delta",
    "Disclosure",
    "Event",
    "Failure",
    "FinishReason",
    "GenerationRequest",
    "Prompt",
    "PromptDelta",
    "Route",
    "SamplingParams",
    "Timing",
    "TokenLogprob",
    "Tokenized",
]

FinishReason = Literal["stop", "length", "abort", "error"]
Route = Literal["pinned", "weighted", "sticky", "canary"]


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How tokens are chosen. Defaults are OpenAI's; the rim has already checked every range."""

    temperature: float = 1.0
    """0 means greedy."""
    top_p: float = 1.0
    top_k: int = 0
    """0 keeps the whole vocabulary."""
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    """Over prompt and output, as in arXiv 1909.05858."""
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int = 0
    """Noise for choice `i` at output position `t` is a pure function of (seed, i, t): it never depends on the batch."""
    max_tokens: int | None = None
    """None: as many as the context allows."""
    min_tokens: int = 0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    logprobs: int | None = None
    """How many alternatives to report beside each output token; None reports nothing, 0 the token alone."""
    prompt_logprobs: int | None = None
    """The same for prompt tokens (`echo` with `logprobs`)."""


@dataclass(frozen=True, slots=True)
class Chat:
    """A conversation for the model's own chat template, which the replica renders (sandboxed)."""

    messages: tuple[Mapping[str, Any], ...]
    add_generation_prompt: bool = True
    continue_final_message: bool = False


Prompt = str | tuple[int, ...] | Chat


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """One prompt, `n` choices. Text is tokenized in the replica: the ingress never loads a tokenizer."""

    request_id: str
    prompt: Prompt
    params: SamplingParams
    n: int = 1
    add_special_tokens: bool = True
    priority: int = 0
    """0 serves a user; higher numbers yield to lower ones (drift scoring, shadow calls)."""
    cache_salt: str = ""
    """Requests share the computation of a common beginning only under the same salt: it keeps tenants apart."""
    keep: Literal["hidden", "logits"] | None = None
    """What to keep of the first choice's own pass, so that another variant can score the answer (see `serve.pairs`)."""


@dataclass(frozen=True, slots=True)
class Tokenized:
    """A prompt as the model's tokenizer sees it; `pieces` are the tokens as text, one per id."""

    ids: tuple[int, ...]
    pieces: tuple[str, ...]
    context_length: int


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A token with its natural-log probability under the raw distribution, before any sampling processor."""

    token_id: int
    text: str
    logprob: float
    bytes: tuple[int, ...] = ()
    """The token's exact UTF-8 bytes; `text` shows U+FFFD where they are no whole character."""
    rank: int = 0
    """1 is the most likely token; 0 where it was not asked for."""
    top: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, slots=True)
class PromptDelta:
    """Opens every answer: what the prompt became once it was tokenized."""

    request_id: str
    prompt_token_ids: tuple[int, ...]
    text: str = ""
    """The prompt as text, filled only where `prompt_logprobs` or echo needs it."""
    logprobs: tuple[TokenLogprob | None, ...] = ()
    """One per prompt token when asked for; the first is None, nothing predicts it."""
    cached_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds that the replica measured on its own monotonic clock, sent with the last delta of a choice."""

    queue_s: float
    """Submitted to the engine → first scheduled."""
    first_token_s: float
    """Submitted to the engine → first token; equals `total_s` where no token was made."""
    total_s: float
    running_sequences: int = 0
    """How many sequences ran when this one was first scheduled: what latency is stratified by."""


@dataclass(frozen=True, slots=True)
class Delta:
    """New tokens of one choice. `text` is whole characters only and never part of a stop string."""

    request_id: str
    choice_index: int
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    """Which stop string or stop token id ended it; None for the end-of-sequence token or a length."""
    timing: Timing | None = None


@dataclass(frozen=True, slots=True)
class Failure:
    """Ends a request whose answer cannot be finished."""

    request_id: str
    error: HalftoneError


Event = PromptDelta | Delta | Failure


@dataclass(frozen=True, slots=True)
class Disclosure:
    """Who serves an answer: sent in the headers of every answer, before its first byte."""

    variant: str
    precision: str
    route: Route
    fingerprint: str
    """The artifact's fingerprint, OpenAI's `system_fingerprint`."""
