"""Many clients at once, and a package that is light to import."""

from __future__ import annotations

import asyncio
import pickle
import subprocess
import sys

import httpx
import pytest
from openai import AsyncOpenAI

from serve.api import ApiSettings, Call, Keys
from serve.generation import GenerationRequest, SamplingParams
from tests.api.conftest import Rim
from tests.api.scripted import ANSWER, words


async def test_two_hundred_streams_at_once_are_each_complete_and_their_own(rim: Rim) -> None:
    limits = httpx.Limits(max_connections=200)
    async with (
        httpx.AsyncClient(limits=limits, timeout=60) as http,
        AsyncOpenAI(base_url=f"{rim.url}/v1", api_key="none", max_retries=0, http_client=http) as client,
    ):

        async def read(index: int) -> None:
            prompt, count = "word " * (1 + index % 9), 1 + index % len(ANSWER)
            stream = await client.completions.create(
                model="tale",
                prompt=prompt,
                max_tokens=count,
                echo=True,
                stream=True,
                stream_options={"include_usage": True},
            )
            chunks = [chunk async for chunk in stream]
            assert "".join(chunk.choices[0].text for chunk in chunks[:-1]) == prompt + "".join(ANSWER[:count])
            assert chunks[-1].usage is not None
            assert chunks[-1].usage.prompt_tokens == len(words(prompt))

        await asyncio.gather(*map(read, range(200)))
    for _ in range(1000):
        if rim.requests() == 0:
            break
        await asyncio.sleep(0.005)
    assert rim.requests() == 0
    assert len(rim.backend.calls) == 200
    assert rim.backend.cancelled == []


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("serve.api", "fastapi starlette pydantic torch ray"),
        ("serve.api.app", "torch transformers ray serve.engine serve.compression.methods"),
    ],
)
def test_the_rim_is_light_to_import(module: str, absent: str) -> None:
    program = f"import sys, {module}; print(*sorted(set({absent.split()!r}) & set(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == ""


def test_calls_and_settings_cross_processes() -> None:
    request = GenerationRequest("r", "p", SamplingParams(stop=("x",), logit_bias={1: 2.0}))
    for value in (Call("tale", (request,), pin="bf16"), ApiSettings(keys=Keys.of(["sk"], "admin"))):
        assert pickle.loads(pickle.dumps(value)) == value
