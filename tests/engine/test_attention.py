from __future__ import annotations

import pytest
import torch
from torch import Tensor

from serve.engine import attention
from serve.engine.attention import AttentionOptions, QueryGroup, reference_attention, tiled_attention
from serve.engine.blocks import NULL_BLOCK, blocks_for
from serve.engine.kv_cache import Pool

HEADS, KEY_HEADS, KEY_SIZE, VALUE_SIZE, BLOCK = 6, 2, 8, 12, 4


def pools(num_blocks: int = 64, dtype: torch.dtype = torch.float32) -> tuple[Pool, Pool]:
    torch.manual_seed(0)
    keys, values = (torch.randn(KEY_HEADS, num_blocks, BLOCK, size) for size in (KEY_SIZE, VALUE_SIZE))
    keys[:, NULL_BLOCK], values[:, NULL_BLOCK] = 0, 0
    return _filled(keys, dtype), _filled(values, dtype)


def _filled(content: Tensor, dtype: torch.dtype) -> Pool:
    pool = Pool(torch.zeros_like(content, dtype=dtype))
    pool.write(
        torch.arange(content.shape[1] * BLOCK),
        content.flatten(1, 2).to(torch.float32 if dtype is torch.int8 else dtype),
    )
    return pool


def group(first_positions: list[int], num_queries: int, num_blocks: int = 64) -> QueryGroup:
    """Sequences whose blocks are scattered over the pool."""
    generator = torch.Generator().manual_seed(1)
    free = (torch.randperm(num_blocks - 1, generator=generator) + 1).tolist()
    counts = [blocks_for(first + num_queries, BLOCK) for first in first_positions]
    tables = [[free.pop() for _ in range(count)] + [NULL_BLOCK] * (counts[0] - count) for count in counts]
    rows = len(first_positions) * num_queries
    return QueryGroup(0, rows, first_positions, num_queries, torch.tensor(tables), BLOCK)


OPTIONS = {
    "plain": AttentionOptions(0.3),
    "window": AttentionOptions(0.3, window=5),
    "window of one": AttentionOptions(0.3, window=1),
    "soft cap": AttentionOptions(1.5, softcap=2.0),
    "sinks": AttentionOptions(0.3, sinks=torch.linspace(-2, 2, HEADS)),
    "all": AttentionOptions(0.8, window=9, softcap=3.0, sinks=torch.linspace(-2, 2, HEADS)),
}
GROUPS = {
    "decode one": ([21], 1),
    "decode many, ragged": ([50, 33, 20, 7, 0], 1),
    "first chunk": ([0], 13),
    "later chunk": ([17], 9),
    "equal chunks": ([12, 4], 6),
}


@pytest.mark.parametrize("tile_tokens", [4, 16, 512])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize(("first_positions", "num_queries"), GROUPS.values(), ids=GROUPS.keys())
def test_tiled_attention_equals_the_plain_reference(
    monkeypatch: pytest.MonkeyPatch,
    first_positions: list[int],
    num_queries: int,
    options: AttentionOptions,
    tile_tokens: int,
) -> None:
    monkeypatch.setattr(attention, "TILE_TOKENS", tile_tokens)
    keys, values = pools()
    rows = group(first_positions, num_queries)
    query = torch.randn(HEADS, len(first_positions) * num_queries, KEY_SIZE)
    ours = tiled_attention(query, keys, values, rows, options)
    assert ours.shape == (len(first_positions) * num_queries, HEADS, VALUE_SIZE)
    torch.testing.assert_close(ours, reference_attention(query, keys, values, rows, options), rtol=1e-5, atol=1e-5)


def test_bf16_caches_are_summed_in_fp32() -> None:
    keys, values = pools(dtype=torch.bfloat16)
    rows = group([40, 30], 1)
    query = torch.randn(HEADS, 2, KEY_SIZE).bfloat16()
    ours = tiled_attention(query, keys, values, rows, OPTIONS["plain"])
    wide = [_filled(pool.data.float(), torch.float32) for pool in (keys, values)]
    exact = reference_attention(query.float(), *wide, rows, OPTIONS["plain"])
    assert ours.dtype is torch.float32
    torch.testing.assert_close(ours, exact, rtol=1e-5, atol=1e-5)


def test_int8_caches_hold_each_vector_within_half_a_step_of_its_own_scale() -> None:
    torch.manual_seed(0)
    content = torch.randn(KEY_HEADS, 6, BLOCK, KEY_SIZE) * torch.logspace(-3, 3, 6)[:, None, None]
    content[:, 2, 1] = 0
    pool = _filled(content, torch.int8)
    exact, read = content.flatten(1, 2), pool.gather(torch.arange(6))
    half_step = exact.abs().amax(-1, keepdim=True) / 127 / 2
    assert ((read - exact).abs() <= half_step * (1 + 1e-5)).all()
    pool.scrub(torch.tensor([3]))
    assert not pool.gather(torch.tensor([3])).any()


def test_tiled_attention_over_an_int8_cache_equals_the_plain_reference() -> None:
    keys, values = pools(dtype=torch.int8)
    rows = group([50, 33, 7], 1)
    query = torch.randn(HEADS, 3, KEY_SIZE)
    ours = tiled_attention(query, keys, values, rows, OPTIONS["all"])
    torch.testing.assert_close(ours, reference_attention(query, keys, values, rows, OPTIONS["all"]))


def test_a_window_reads_only_the_tiles_that_it_can_see(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "TILE_TOKENS", 8)
    rows = group([50], 1)
    assert len(rows.tiles(None)) == 7
    assert len(rows.tiles(5)) == 2


def test_no_tile_grows_with_the_context(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "TILE_TOKENS", 16)
    rows = group([200], 1)
    assert max(len(tile.blocks) for tile in rows.tiles(None)) * BLOCK <= 16
