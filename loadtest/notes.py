"""What a reader must know before believing the numbers, in sentences."""

from collections.abc import Iterator, Sequence

from loadtest.record import Record
from loadtest.results import Json

MANY_TOKENS_PER_CHUNK = 1.1


def notes(records: Sequence[Record], status: str, generator: Json, prompt_count: int | None) -> Iterator[str]:
    """Of one stage; `prompt_count` is how many prompts its file has, None where they are made up."""
    yield from (f"the generator was the bottleneck: {reason}" for reason in generator["reasons"])
    if status == "aborted" and records:
        yield f"gave up: the first {len(records)} requests all failed: {records[0].error_detail}"
    if status == "interrupted":
        waiting = sum(record.interrupted for record in records)
        yield f"stopped early; {waiting} requests were in flight and are not judged"
    if all(record.warmup for record in records):
        yield f"nothing was measured: {len(records)} requests were warm-up and none came after"
    if prompt_count is not None and len(records) > prompt_count:
        yield f"{len(records)} requests of {prompt_count} prompts: repeats may hit a prefix cache"
    yield from _about_tokens([record for record in records if record.ok])


def _about_tokens(done: Sequence[Record]) -> Iterator[str]:
    uncounted = sum(record.usage_tokens is None for record in done)
    if uncounted:
        yield f"{uncounted} answers came without usage; their tokens were counted from text or chunks"
    tokens = sum(record.tokens for record in done if record.chunks_s)
    chunks = sum(len(record.chunks_s) for record in done)
    if chunks and tokens / chunks >= MANY_TOKENS_PER_CHUNK:
        each = f"a chunk carried {tokens / chunks:.2f} tokens"
        yield f"{each}; itl_s is the gap between chunks, tpot_s the time per token"
