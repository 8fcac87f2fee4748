"""One choice of one request on its way through the engine: its tokens, and how many of them are in the KV cache."""

from __future__ import annotations

from dataclasses import dataclass, field

from serve.engine.witness import Witness
from serve.generation import SamplingParams

__all__ = ["Sequence"]


@dataclass(slots=True, eq=False)
class Sequence:
    """Prompt and output tokens of one choice. The first `num_computed` of them have their keys and values in `blocks`.

    What remains is computed next: a whole prompt, one new token, or, after a preemption, prompt and output again.
    """

    request_id: str
    choice_index: int
    tokens: list[int]
    num_prompt_tokens: int
    params: SamplingParams
    max_tokens: int
    """Output tokens after which it ends, resolved against the context."""
    arrival: int
    priority: int = 0
    submitted_s: float = 0.0
    cache_salt: str = ""
    """Only sequences with the same salt read each other's KV blocks."""
    leader: Sequence | None = None
    """The first choice of the same request: what it computes of the prompt need not be computed again."""
    witness: Witness | None = None

    blocks: list[int] = field(default_factory=list)
    block_keys: list[bytes] = field(default_factory=list)
    """Names of its full blocks, as far as they were needed (see `prefix`)."""
    num_registered: int = 0
    """Its first blocks that others may read."""
    num_computed: int = 0
    num_reused: int = 0
    """Tokens whose keys and values were there when it was first scheduled."""
    rope_tokens: int = 0
    """Positions are embedded for a context of at least this many tokens: the prompt's, in whatever chunks it comes."""
    num_scored: int = 0
    """Prompt positions whose logits have been turned into prompt logprobs, or were shown to the witness."""
    num_kept: int = 0
    """Positions whose hidden states the witness has seen."""
    first_scheduled_s: float | None = None
    first_token_s: float | None = None
    running_when_scheduled: int = 0

    def __post_init__(self) -> None:
        self.rope_tokens = self.num_prompt_tokens

    def embed_again(self) -> None:
        """The text outgrew its rotary embedding's short form: compute it anew, embedded for its present length."""
        self.num_computed, self.rope_tokens = 0, self.num_tokens

    @property
    def rank(self) -> tuple[int, int]:
        """Lower is served first and preempted last."""
        return self.priority, self.arrival

    @property
    def num_tokens(self) -> int:
        return len(self.tokens)

    @property
    def num_output_tokens(self) -> int:
        return len(self.tokens) - self.num_prompt_tokens

    @property
    def num_pending(self) -> int:
        """Tokens that are known but not computed: 1 while it decodes."""
        return len(self.tokens) - self.num_computed

    @property
    def scores_prompt(self) -> bool:
        """Whether prompt logprobs are asked for: choices of one request share those of the first."""
        return self.only_scores or (self.params.prompt_logprobs is not None and self.choice_index == 0)

    @property
    def only_scores(self) -> bool:
        """A text that is scored for its witness alone: nobody waits for it."""
        return self.witness is not None and self.witness.wants == "prompt_logits"

    @property
    def first_scored(self) -> int:
        return self.witness.first if self.witness is not None and self.only_scores else 0

    @property
    def keeps_hidden(self) -> bool:
        return self.witness is not None and self.witness.wants == "hidden"
