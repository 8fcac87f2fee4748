"""What a request must be before it may enter the engine, and the sequences that it becomes."""

from __future__ import annotations

from typing import Any

from serve.engine.sequence import Sequence
from serve.engine.settings import EngineSettings
from serve.engine.vocabulary import Vocabulary
from serve.engine.witness import Witness
from serve.errors import ContextLengthExceeded, InvalidRequest, UnsupportedArchitecture
from serve.generation import GenerationRequest

__all__ = ["check", "context_tokens", "end_token_ids", "sequences_of"]


def check(request: GenerationRequest, vocabulary_size: int, settings: EngineSettings) -> None:
    """Raises InvalidRequest or ContextLengthExceeded, naming the field."""
    prompt = _token_ids(request)
    if not prompt:
        raise InvalidRequest("the prompt is empty", param="prompt")
    for token_id in prompt:
        if not 0 <= token_id < vocabulary_size:
            raise InvalidRequest(f"token id {token_id} is outside the vocabulary of {vocabulary_size}", param="prompt")
    for token_id in request.params.logit_bias:
        if not 0 <= token_id < vocabulary_size:
            raise InvalidRequest(
                f"token id {token_id} is outside the vocabulary of {vocabulary_size}", param="logit_bias"
            )
    if not 1 <= request.n <= settings.max_num_seqs:
        raise InvalidRequest(f"n must be between 1 and {settings.max_num_seqs}, not {request.n}", param="n")
    _check_length(len(prompt), request.params.max_tokens, settings.max_model_len or 0)


def _check_length(prompt_tokens: int, max_tokens: int | None, context_tokens: int) -> None:
    if prompt_tokens + (1 if max_tokens is None else 0) > context_tokens:
        raise ContextLengthExceeded(
            f"the prompt has {prompt_tokens} tokens; this model's context holds {context_tokens}, output included",
            param="prompt",
        )
    if max_tokens is not None and prompt_tokens + max_tokens > context_tokens:
        raise ContextLengthExceeded(
            f"{prompt_tokens} prompt tokens and max_tokens {max_tokens} make {prompt_tokens + max_tokens}; "
            f"this model's context holds {context_tokens}",
            param="max_tokens",
        )


def sequences_of(
    request: GenerationRequest,
    settings: EngineSettings,
    first_arrival: int,
    submitted_s: float,
    witness: Witness | None = None,
) -> list[Sequence]:
    """One sequence per choice, of a request that `check` let through; the witness sees the first."""
    prompt = _token_ids(request)
    room = (settings.max_model_len or 0) - len(prompt)
    max_tokens = room if request.params.max_tokens is None else request.params.max_tokens
    sequences = [
        Sequence(
            request_id=request.request_id,
            choice_index=index,
            tokens=list(prompt),
            num_prompt_tokens=len(prompt),
            params=request.params,
            max_tokens=max_tokens,
            arrival=first_arrival + index,
            priority=request.priority,
            submitted_s=submitted_s,
            cache_salt=request.cache_salt,
            witness=witness if index == 0 else None,
        )
        for index in range(request.n)
    ]
    for follower in sequences[1:]:
        follower.leader = sequences[0]
    return sequences


def context_tokens(config: Any) -> int:
    """The longest text that a model's configuration allows. Dynamic scaling stretches it by its factor."""
    tokens = getattr(config, "max_position_embeddings", None)
    if not isinstance(tokens, int):
        raise UnsupportedArchitecture("the model's configuration does not say how long its context is")
    rope = getattr(config, "rope_parameters", None) or {}
    return int(tokens * float(rope["factor"])) if rope.get("rope_type") == "dynamic" else tokens


def end_token_ids(model: Any, vocabulary: Vocabulary) -> frozenset[int]:
    """Every token that ends a text: the checkpoint's generation configuration may name more than the tokenizer."""
    configured = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    if configured is None:
        return frozenset(vocabulary.end_ids)
    return frozenset(vocabulary.end_ids) | frozenset([configured] if isinstance(configured, int) else configured)


def _token_ids(request: GenerationRequest) -> tuple[int, ...]:
    if not isinstance(request.prompt, tuple):
        raise InvalidRequest("the engine takes token ids; text is encoded before it comes here", param="prompt")
    return request.prompt
