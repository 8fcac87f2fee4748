from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from serve.engine.settings import EngineSettings, resolve
from serve.errors import ConfigError


@pytest.mark.parametrize(
    ("changes", "path"),
    [
        ({"max_num_seqs": 0}, "max_num_seqs"),
        ({"block_size": -1}, "block_size"),
        ({"kv_cache_bytes": "1GiB"}, "kv_cache_bytes"),
        ({"threads": 0}, "threads"),
        ({"kv_cache_dtype": "fp4"}, "kv_cache_dtype"),
        ({"max_queue": True}, "max_queue"),
        ({"max_num_seqs": 64, "max_num_batched_tokens": 32}, "max_num_batched_tokens"),
    ],
)
def test_a_setting_out_of_range_is_named(changes: dict[str, Any], path: str) -> None:
    with pytest.raises(ConfigError) as caught:
        EngineSettings(**changes)
    assert caught.value.path == path


def test_auto_is_filled_in_on_a_copy() -> None:
    asked = EngineSettings(max_num_seqs=2, block_size=16)
    filled = resolve(asked, context_tokens=128, kv_bytes_per_token=10, free_bytes=10**9)
    assert (filled.max_model_len, filled.kv_cache_bytes) == (128, 2 * 128 * 10)
    assert asked.kv_cache_bytes is None


def test_auto_takes_a_share_of_the_free_memory_but_room_for_one_sequence() -> None:
    wide = resolve(EngineSettings(), context_tokens=1000, kv_bytes_per_token=10**6, free_bytes=20 * 10**9)
    assert wide.kv_cache_bytes == 4 * 10**9
    tight = resolve(EngineSettings(), context_tokens=1000, kv_bytes_per_token=10**6, free_bytes=10**9)
    assert tight.kv_cache_bytes == 1024 * 10**6


@pytest.mark.parametrize(
    ("changes", "path"), [({"max_model_len": 129}, "max_model_len"), ({"kv_cache_bytes": 1000}, "kv_cache_bytes")]
)
def test_what_the_model_cannot_hold_is_refused(changes: dict[str, int], path: str) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve(EngineSettings(**changes), context_tokens=128, kv_bytes_per_token=10, free_bytes=10**9)
    assert caught.value.path == path


def test_settings_load_without_torch() -> None:
    code = "import sys; from serve.engine import EngineSettings; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
