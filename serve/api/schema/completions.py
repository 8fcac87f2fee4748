"""`POST /v1/completions`: prompts as text or token ids, continued."""

from __future__ import annotations

from pydantic import Field

from serve.api.limits import MAX_CHOICES
from serve.api.schema.sampling import Flag, GenerationBody, LogprobCount, TokenCount
from serve.api.schema.text import Prompts
from serve.errors import InvalidRequest
from serve.generation import GenerationRequest

__all__ = ["CompletionBody"]

_DEFAULT_MAX_TOKENS = 16


class CompletionBody(GenerationBody):
    kind = "cmpl"

    prompt: Prompts
    max_tokens: TokenCount | None = Field(default=_DEFAULT_MAX_TOKENS, description="0 with `echo` scores the prompt.")
    echo: Flag = False
    logprobs: LogprobCount | None = None
    add_special_tokens: bool | None = None

    def requests(self, call_id: str) -> tuple[GenerationRequest, ...]:
        """One per prompt. Raises `InvalidRequest` where fields contradict each other."""
        max_tokens = _DEFAULT_MAX_TOKENS if self.max_tokens is None else self.max_tokens
        self.check(max_tokens)
        if len(self.prompt) * self.choices > MAX_CHOICES:
            raise InvalidRequest(f"n: prompts times n must not exceed {MAX_CHOICES}", param="n")
        return tuple(
            GenerationRequest(
                request_id=f"{call_id}-{index}",
                prompt=prompt,
                params=self.sampling(
                    max_tokens=max_tokens, logprobs=self.logprobs, prompt_logprobs=self._prompt_logprobs()
                ),
                n=self.choices,
                add_special_tokens=self.add_special_tokens is not False,
            )
            for index, prompt in enumerate(self.prompt)
        )

    def _prompt_logprobs(self) -> int | None:
        """As many as the wider of `prompt_logprobs` and, with `echo`, `logprobs` asks for."""
        counts = [self.prompt_logprobs, self.logprobs if self.echo else None]
        return max((count for count in counts if count is not None), default=None)
