"""The fields that completions and chat share: OpenAI's, and vLLM's extensions with vLLM's meanings."""

from __future__ import annotations

import random
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, PlainValidator, WithJsonSchema

from serve.api.limits import MAX_CHOICES, MAX_LOGIT_BIAS, MAX_LOGPROBS, MAX_TOKEN_ID
from serve.api.schema.body import Body, wrong
from serve.api.schema.text import StopStrings, StopTokenIds
from serve.errors import InvalidRequest
from serve.generation import SamplingParams

__all__ = ["CallKind", "GenerationBody", "LogprobCount", "ModelName", "StreamOptions", "TokenCount"]

CallKind = Literal["cmpl", "chatcmpl"]
"""What OpenAI's ids begin with."""

_SEED_BITS = 63


def _logit_bias(value: object) -> dict[int, float]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise wrong("must map token ids to numbers from -100 to 100")
    if len(value) > MAX_LOGIT_BIAS:
        raise wrong(f"must hold at most {MAX_LOGIT_BIAS} entries, got {len(value)}")
    return {_token_id(key): _bias(key, bias) for key, bias in value.items()}


def _token_id(key: Any) -> int:
    if not (isinstance(key, str) and key.isascii() and key.isdecimal() and len(key) <= 10 and int(key) <= MAX_TOKEN_ID):
        raise wrong("must have token ids as keys")
    return int(key)


def _bias(key: str, bias: Any) -> float:
    if type(bias) not in (int, float) or not -100 <= bias <= 100:
        raise wrong("must be a number from -100 to 100", f".{key}")
    return float(bias)


def _null_is_false(value: object) -> object:
    return False if value is None else value


ModelName = Annotated[str, Field(min_length=1, max_length=256)]
TokenCount = Annotated[int, Field(ge=0, le=2**31 - 1)]
LogprobCount = Annotated[int, Field(ge=0, le=MAX_LOGPROBS)]
Flag = Annotated[
    bool,
    BeforeValidator(_null_is_false),
    WithJsonSchema({"anyOf": [{"type": "boolean"}, {"type": "null"}]}),
]
Penalty = Annotated[float, Field(ge=-2, le=2)]
LogitBias = Annotated[
    dict[int, float],
    PlainValidator(_logit_bias),
    WithJsonSchema(
        {
            "anyOf": [
                {
                    "type": "object",
                    "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100},
                    "maxProperties": MAX_LOGIT_BIAS,
                },
                {"type": "null"},
            ]
        }
    ),
]


class StreamOptions(Body):
    """include_usage: a last chunk says what was used. continuous_usage_stats: so does every chunk before it."""

    include_usage: Flag = False
    continuous_usage_stats: Flag = False


class GenerationBody(Body):
    kind: ClassVar[CallKind]

    model: ModelName
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    best_of: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    stream: Flag = False
    stream_options: StreamOptions | None = None
    user: Annotated[str, Field(max_length=1024)] | None = None

    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=MAX_TOKEN_ID)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=100)] | None = None
    logit_bias: LogitBias = Field(default_factory=dict)
    seed: Annotated[int, Field(ge=-(2**_SEED_BITS), lt=2**_SEED_BITS)] | None = None

    min_tokens: TokenCount | None = None
    stop: StopStrings = ()
    stop_token_ids: StopTokenIds = ()
    ignore_eos: Flag = False
    include_stop_str_in_output: Flag = False
    skip_special_tokens: bool | None = None
    prompt_logprobs: LogprobCount | None = None
    return_token_ids: Flag = False
    cache_salt: Annotated[str, Field(min_length=1, max_length=256)] | None = None

    @property
    def choices(self) -> int:
        return self.n or 1

    @property
    def includes_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def continues_usage(self) -> bool:
        return self.includes_usage and self.stream_options is not None and self.stream_options.continuous_usage_stats

    def sampling(self, *, max_tokens: int | None, logprobs: int | None, prompt_logprobs: int | None) -> SamplingParams:
        """The checked fields as the engine takes them; an absent seed is drawn here, anew for every prompt."""
        return SamplingParams(
            temperature=_default(self.temperature, 1.0),
            top_p=_default(self.top_p, 1.0),
            top_k=max(0, self.top_k or 0),
            min_p=self.min_p or 0.0,
            repetition_penalty=_default(self.repetition_penalty, 1.0),
            presence_penalty=self.presence_penalty or 0.0,
            frequency_penalty=self.frequency_penalty or 0.0,
            seed=random.getrandbits(_SEED_BITS) if self.seed is None else self.seed % 2**_SEED_BITS,
            max_tokens=max_tokens,
            min_tokens=self.min_tokens or 0,
            stop=self.stop,
            stop_token_ids=self.stop_token_ids,
            ignore_eos=self.ignore_eos,
            include_stop_str_in_output=self.include_stop_str_in_output,
            skip_special_tokens=self.skip_special_tokens is not False,
            logit_bias=self.logit_bias,
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
        )

    def check(self, max_tokens: int | None) -> None:
        """What single fields cannot know. Raises `InvalidRequest`."""
        if self.best_of not in (None, self.choices):
            raise InvalidRequest(f"best_of must equal n ({self.choices}): every choice is returned", param="best_of")
        if max_tokens is not None and (self.min_tokens or 0) > max_tokens:
            raise InvalidRequest(f"min_tokens must not exceed max_tokens ({max_tokens})", param="min_tokens")
        if self.stream_options is not None and not self.stream:
            raise InvalidRequest("stream_options is only allowed with stream: true", param="stream_options")
        if self.stream and self.prompt_logprobs is not None:
            raise InvalidRequest("prompt_logprobs is not available with stream: true", param="prompt_logprobs")


def _default(value: float | None, default: float) -> float:
    return default if value is None else float(value)
