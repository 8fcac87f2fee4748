"""What an operator may decide about the engine. Torch-free: a configuration is checked without loading a model."""

from __future__ import annotations

from dataclasses import dataclass, replace

from serve.errors import ConfigError

__all__ = ["EngineSettings", "resolve"]

KV_CACHE_DTYPES = ("auto", "int8")
_COUNTS = ("max_num_seqs", "max_num_batched_tokens", "max_prefill_tokens_beside_decode", "block_size", "max_queue")
_FREE_MEMORY_RATIO = 0.2
"""Share of the free memory that the KV cache takes at most when its size is "auto": variants share a machine."""


@dataclass(frozen=True, slots=True)
class EngineSettings:
    """The engine's limits. None means "auto": `resolve` returns a copy that has every value."""

    max_num_seqs: int = 64
    """Sequences that run at once; the others wait."""
    max_num_batched_tokens: int = 512
    """Tokens per step, decode and prefill together: a longer prompt is computed in chunks."""
    max_prefill_tokens_beside_decode: int = 128
    """Prompt tokens per step while other sequences decode, so that a long prompt does not stall their next token."""
    block_size: int = 32
    """Tokens per KV block."""
    kv_cache_bytes: int | None = None
    kv_cache_dtype: str = "auto"
    """What keys and values are stored in: "auto" is the model's own type; "int8" holds twice as many tokens as bf16."""
    max_model_len: int | None = None
    """Prompt and output tokens of one sequence; None takes the model's own context."""
    max_queue: int = 1024
    """Sequences that may wait before further requests are refused."""
    threads: int | None = None
    """Torch threads of the engine's thread; None leaves torch's default."""
    prefix_cache: bool = True
    """Keep the KV blocks of past texts while memory allows, and compute a beginning that comes again only once."""
    native: bool = True
    """Run covered models on the compiled kernels where there are any; the plain path serves everything else."""

    def __post_init__(self) -> None:
        for name in _COUNTS:
            _require_positive(name, getattr(self, name))
        for name in ("kv_cache_bytes", "max_model_len", "threads"):
            if getattr(self, name) is not None:
                _require_positive(name, getattr(self, name))
        if self.kv_cache_dtype not in KV_CACHE_DTYPES:
            raise ConfigError(
                "kv_cache_dtype", f"must be one of {', '.join(KV_CACHE_DTYPES)}, not {self.kv_cache_dtype!r}"
            )
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ConfigError(
                "max_num_batched_tokens",
                f"{self.max_num_batched_tokens} is below max_num_seqs ({self.max_num_seqs}): every running sequence "
                "must get its token each step; raise it or lower max_num_seqs",
            )


def _require_positive(name: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConfigError(name, f"must be a whole number of at least 1, not {value!r}")


def resolve(
    settings: EngineSettings, *, context_tokens: int, kv_bytes_per_token: int, free_bytes: int
) -> EngineSettings:
    """Fill in "auto" from facts of the model and the machine.

    context_tokens: the longest sequence that the model allows; kv_bytes_per_token: over all layers.
    Raises ConfigError where the KV cache cannot hold one sequence of `max_model_len` tokens.
    """
    max_model_len = settings.max_model_len or context_tokens
    if max_model_len > context_tokens:
        raise ConfigError("max_model_len", f"{max_model_len} is over the model's context of {context_tokens} tokens")
    wanted_bytes = settings.max_num_seqs * max_model_len * kv_bytes_per_token
    least_bytes = _whole_blocks(max_model_len, settings.block_size) * kv_bytes_per_token
    kv_cache_bytes = settings.kv_cache_bytes or max(
        least_bytes, min(wanted_bytes, int(free_bytes * _FREE_MEMORY_RATIO))
    )
    if kv_cache_bytes < least_bytes:
        raise ConfigError(
            "kv_cache_bytes",
            f"{kv_cache_bytes} cannot hold one sequence of {max_model_len} tokens, which takes {least_bytes} bytes; "
            "raise it or lower max_model_len",
        )
    return replace(settings, kv_cache_bytes=kv_cache_bytes, max_model_len=max_model_len)


def _whole_blocks(tokens: int, block_size: int) -> int:
    return -(-tokens // block_size) * block_size
