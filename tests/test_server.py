"""The whole server on a real local Ray cluster, through the official client: one cluster for all tests of this file."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from tests.deployments.scraping import Prometheus
from tests.running import ROOT, Halftone

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(400)]

CONFIG = """
model: {name: storyteller, source: "builtin:storyteller"}
variants:
  - {name: fp32, recipe: fp32, engine: {max_num_seqs: 64}}
  - {name: int8, recipe: int8}
  - {name: broken, recipe: bf16, source: SOURCE}
traffic: {stable: fp32, weights: {fp32: 50, int8: 50, broken: 0}}
"""


COUNTERS = (
    "halftone_request_success_total", "halftone_generation_tokens_total", "halftone_prompt_tokens_total",
    "halftone_time_to_first_token_seconds_count",
)  # fmt: skip


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Halftone]:
    folder = tmp_path_factory.mktemp("server")
    (folder / "empty").mkdir()
    config = folder / "config.yaml"
    config.write_text(CONFIG.replace("SOURCE", str(folder / "empty")))
    with Halftone(str(config)) as running:
        yield running


@pytest.fixture
def client(server: Halftone) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60) as made:
        yield made


def test_the_table_says_what_was_loaded_and_what_was_not(server: Halftone) -> None:
    rows = {row["variant"]: row for row in server.announced["variants"]}
    assert rows["fp32"]["state"] == rows["int8"]["state"] == "ready"
    assert rows["int8"]["weight_bytes"] < rows["fp32"]["weight_bytes"] / 2
    assert rows["int8"]["bits_per_weight"] < 9
    assert rows["broken"]["state"] == "failed"
    assert "config.json" in rows["broken"]["reason"]


@pytest.mark.parametrize("model", ["storyteller", "storyteller@fp32", "storyteller@int8"])
def test_completions_and_chats_answer_whole_and_streamed(client: openai.OpenAI, model: str) -> None:
    whole = client.completions.create(model=model, prompt="Once upon a time", max_tokens=16, temperature=0, user="u")
    pieces = client.completions.create(
        model=model, prompt="Once upon a time", max_tokens=16, temperature=0, user="u", stream=True
    )
    assert whole.choices[0].text
    assert "".join(piece.choices[0].text for piece in pieces) == whole.choices[0].text
    chat = client.chat.completions.create(
        model=model, messages=[{"role": "user", "content": "Tell me a story."}], max_tokens=16, temperature=0
    )
    assert chat.choices[0].message.content
    assert chat.usage is not None
    assert chat.usage.completion_tokens <= 16


async def test_two_hundred_streams_of_mixed_length_all_finish_whole(server: Halftone) -> None:
    lengths = [4 + 7 * index % 60 for index in range(200)]
    made_before = server.metric("generation_tokens_total", variant="int8")
    async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=300) as client:

        async def ask(index: int) -> tuple[int, str]:
            stream = await client.completions.create(
                model="storyteller@int8",
                prompt=f"Story number {index}",
                max_tokens=lengths[index],
                temperature=0,
                stream=True,
                stream_options={"include_usage": True},
                extra_body={"ignore_eos": True},
            )
            chunks = [chunk async for chunk in stream]
            assert chunks[-1].usage is not None
            assert chunks[-2].choices[0].finish_reason == "length"
            text = "".join(choice.text for chunk in chunks for choice in chunk.choices)
            return chunks[-1].usage.completion_tokens, text

        answers = await asyncio.gather(*map(ask, range(200)))
        assert [tokens for tokens, _ in answers] == lengths
        alone = await client.completions.create(
            model="storyteller@int8",
            prompt="Story number 7",
            max_tokens=lengths[7],
            temperature=0,
            extra_body={"ignore_eos": True},
        )
    assert answers[7][1][:20] == alone.choices[0].text[:20]
    assert server.metric("generation_tokens_total", variant="int8") - made_before == sum(lengths) + lengths[7]
    server.wait_until(lambda: server.metric("kv_cache_usage_ratio", variant="int8") == 0)


def test_every_answer_says_who_served_it(server: Halftone) -> None:
    body = {"model": "storyteller", "prompt": "Once", "max_tokens": 1}
    pinned = httpx.post(f"{server.url}/v1/completions", json=body, headers={"x-halftone-variant": "int8"})
    assert pinned.headers["x-halftone-variant"] == pinned.headers["x-halftone-precision"] == "int8"
    assert pinned.headers["x-halftone-route"] == "pinned"
    dealt = httpx.post(f"{server.url}/v1/completions", json=body)
    assert dealt.headers["x-halftone-route"] == "weighted"
    sticky = {httpx.post(f"{server.url}/v1/completions", json={**body, "user": "ada"}).headers[h] for h in HEADERS}
    assert sticky >= {"sticky"}
    assert (
        pinned.json()["system_fingerprint"]
        != httpx.post(f"{server.url}/v1/completions", json={**body, "model": "storyteller@fp32"}).json()[
            "system_fingerprint"
        ]
    )


HEADERS = ("x-halftone-variant", "x-halftone-route")


def test_a_variant_that_cannot_load_is_refused_by_name_and_reason_while_the_others_serve(
    server: Halftone, client: openai.OpenAI
) -> None:
    refused = httpx.post(f"{server.url}/v1/completions", json={"model": "storyteller@broken", "prompt": "x"})
    assert refused.status_code == 503
    assert int(refused.headers["retry-after"]) > 0
    assert "broken" in refused.json()["error"]["message"]
    assert "config.json" in refused.json()["error"]["message"]
    assert "Traceback" not in refused.text
    assert client.completions.create(model="storyteller", prompt="x", max_tokens=1).choices
    assert httpx.get(f"{server.url}/ready").status_code == 200


def test_an_unknown_model_is_a_404_that_names_what_is_served(client: openai.OpenAI) -> None:
    for model in ("gpt-4", "storyteller@fp8"):
        with pytest.raises(openai.NotFoundError, match="storyteller@int8"):
            client.completions.create(model=model, prompt="x")


def test_a_prompt_over_the_context_comes_back_from_the_replica_as_a_400(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        client.completions.create(model="storyteller@int8", prompt="word " * 3000, max_tokens=5)
    assert refused.value.code == "context_length_exceeded"


def test_changing_weights_moves_new_requests_and_restarts_nothing(server: Halftone) -> None:
    before = {process.pid for process in server.family() if "ServeReplica" in "".join(process.cmdline())}
    for weights in ({"fp32": 0, "int8": 100, "broken": 0}, {"fp32": 100, "int8": 0, "broken": 0}):
        changed = httpx.put(f"{server.url}/admin/traffic", json={"weights": weights})
        assert changed.status_code == 200, changed.text
        body = {"model": "storyteller", "prompt": "Once", "max_tokens": 1}
        served = {httpx.post(f"{server.url}/v1/completions", json=body).headers["x-halftone-variant"] for _ in range(8)}
        assert served == {name for name, weight in weights.items() if weight}
    assert {process.pid for process in server.family() if "ServeReplica" in "".join(process.cmdline())} == before
    wrong = httpx.put(f"{server.url}/admin/traffic", json={"weights": {"fp32": 20, "int9": 80}})
    assert wrong.status_code == 400
    assert "int9" in wrong.json()["error"]["message"]


def test_an_experiment_deals_users_reports_what_they_got_and_gives_the_traffic_back(
    server: Halftone, client: openai.OpenAI
) -> None:
    admin = f"{server.url}/admin"
    before = httpx.get(f"{admin}/traffic").json()
    body = {"name": "pair", "weights": {"fp32": 50, "int8": 50}, "settle_s": 0, "block_s": 1, "price_per_hour": 1}
    started = httpx.post(f"{admin}/experiments", json=body)
    assert started.status_code == 200, started.text
    assert started.json()["state"] == "running"
    for path, asked in (("experiments", {**body, "name": "other"}), ("rollouts", {"to": "int8"})):
        assert httpx.post(f"{admin}/{path}", json=asked).status_code == 409
    assert httpx.put(f"{admin}/traffic", json={"weights": {"fp32": 100}}).status_code == 409
    server.wait_until(lambda: server.metric("traffic_weight_ratio", variant="int8") == 0.5)
    time.sleep(1.2)  # until every ingress has asked for the split
    served: dict[str, set[str]] = {}
    asked_for = 0

    def ask_all_users() -> None:
        for user in (f"user-{index}" for index in range(12)):
            answer = client.completions.with_raw_response.create(
                model="storyteller", prompt="Once", max_tokens=4, user=user, extra_body={"ignore_eos": True}
            )
            served.setdefault(user, set()).add(answer.headers["x-halftone-variant"])

    def report() -> dict[str, Any]:
        return dict(httpx.get(f"{admin}/experiments/pair/report", timeout=30).json())

    def told(shown: dict[str, Any]) -> int:
        return int(sum(row["n"] for row in shown["variants"]) + shown["left_out"]["warm_up"])

    while not all(row["n"] for row in report()["variants"]):  # the first seconds of a replica are warm-up
        ask_all_users()
        asked_for += 12
        server.wait_until(lambda sent=asked_for: told(report()) == sent)
    client.completions.create(model="storyteller@int8", prompt="Once", max_tokens=4)
    assert all(len(variants) == 1 for variants in served.values())
    assert set.union(*served.values()) == {"fp32", "int8"}

    seen = {row["variant"]: row for row in report()["variants"]}
    for name in ("fp32", "int8"):
        assert seen[name]["units"] == sum(variants == {name} for variants in served.values())
        assert seen[name]["itl_s"]["p50"]["estimate"] > 0
        assert seen[name]["completion_tokens"] == 4 * seen[name]["n"]
        assert seen[name]["cost_per_million_tokens"] > 0
        assert seen[name]["memory_bytes"]["weights"] > 0
    server.wait_until(lambda: report()["left_out"]["pinned"] == 1)
    stopped = httpx.post(f"{admin}/experiments/pair/stop")
    assert (stopped.status_code, stopped.json()["state"]) == (200, "ended")
    server.wait_until(lambda: httpx.get(f"{admin}/traffic").json()["revision"] > before["revision"] + 1)
    after = httpx.get(f"{admin}/traffic").json()
    assert {**after, "revision": 0} == {**before, "revision": 0}
    assert httpx.get(f"{admin}/experiments/nobody/report").status_code == 404


def test_a_client_that_leaves_frees_its_blocks(server: Halftone) -> None:
    body = {"model": "storyteller@fp32", "prompt": "Once", "max_tokens": 1000, "stream": True, "ignore_eos": True}
    aborted = server.metric("request_success_total", variant="fp32", finished_reason="abort")
    with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=60) as answer:
        lines = answer.iter_lines()  # kept: httpx hangs up once it is collected
        next(lines)
        server.wait_until(lambda: server.metric("num_requests_running", variant="fp32") == 1)
    server.wait_until(lambda: server.metric("num_requests_running", variant="fp32") == 0, timeout_s=5)
    assert server.metric("kv_cache_usage_ratio", variant="fp32") == 0
    assert server.metric("request_success_total", variant="fp32", finished_reason="abort") == aborted + 1


def test_counts_are_exact_the_moment_an_answer_is_there(server: Halftone) -> None:
    names = ("prompt_tokens_total", "generation_tokens_total", "time_to_first_token_seconds_count")
    before = [server.metric(name, variant="int8") for name in names]
    body = {"model": "storyteller@int8", "prompt": [5, 6, 7, 8], "max_tokens": 9, "ignore_eos": True}
    httpx.post(f"{server.url}/v1/completions", json=body).raise_for_status()
    assert [server.metric(name, variant="int8") - was for name, was in zip(names, before, strict=True)] == [4, 9, 1]


def test_prometheus_counts_what_the_load_generator_counted(server: Halftone, tmp_path: Path) -> None:
    halves = {"fp32": 50, "int8": 50, "broken": 0}
    assert httpx.put(f"{server.url}/admin/traffic", json={"weights": halves}).status_code == 200
    with Prometheus(tmp_path, server.url.removeprefix("http://")) as prometheus:
        before = {name: prometheus.query(f"sum by (variant) ({name})") for name in COUNTERS}
        options = ("--num-requests", "40", "--concurrency", "4", "--output-tokens", "12")
        result = load(server, *options, "--server-metrics", f"{server.url}/metrics")
        for name in ("ttft_s", "itl_s", "e2e_s"):
            seen = result["server_metrics"][name]
            assert seen["server_count"] == seen["count"] > 0
            assert seen["p50"]["agrees"] is not None  # whether it does is for an idle machine to tell
        sent = result["by_variant"]
        counted = {
            "halftone_request_success_total": {v: row["requests"]["succeeded"] for v, row in sent.items()},
            "halftone_generation_tokens_total": {v: row["completion_tokens"]["total"] for v, row in sent.items()},
            "halftone_prompt_tokens_total": {v: row["prompt_tokens"]["total"] for v, row in sent.items()},
            "halftone_time_to_first_token_seconds_count": {v: row["ttft_s"]["count"] for v, row in sent.items()},
        }
        assert set(sent) == {"fp32", "int8"}
        for name, by_variant in counted.items():
            for variant, count in by_variant.items():
                expected = before[name].get(variant, 0.0) + count
                prometheus.wait_until(lambda: prometheus.query(f"sum by (variant) ({name})")[variant] == expected)  # noqa: B023
        assert [rule["name"] for rule in prometheus.rules() if rule["health"] != "ok"] == []
        failing = prometheus.query("halftone:request_failures:ratio_rate5m")
        assert failing.keys() >= {"fp32", "int8"}
        assert prometheus.query('ALERTS{alertname="HalftoneVariantWithoutReplica"}').keys() == {"broken"}


def load(server: Halftone, *options: str) -> dict[str, Any]:
    """What the load generator saw, nothing left out as warm-up."""
    command = [sys.executable, "-m", "loadtest", "run", "--url", server.url, "--model", "storyteller", "--warmup", "0"]
    done = subprocess.run([*command, *options, "--json"], capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout))


def test_no_label_is_a_clients_invention(server: Halftone) -> None:
    body = {"model": "gremlin", "prompt": "gremlin", "user": "gremlin", "max_tokens": 1, "gremlin": "gremlin"}
    for headers in ({}, {"x-halftone-variant": "gremlin"}, {"x-request-id": "gremlin"}):
        for changes in ({}, {"model": "storyteller"}, {"model": "storyteller", "max_tokens": -1}):
            httpx.post(f"{server.url}/v1/completions", json={**body, **changes}, headers=headers, timeout=30)
    httpx.post(f"{server.url}/gremlin")
    assert "gremlin" not in httpx.get(f"{server.url}/metrics").text


def test_only_loopback_is_listened_on(server: Halftone) -> None:
    ours = {server.process.pid, *(process.pid for process in server.family())}
    open_ports = [
        f"{listening.laddr.ip}:{listening.laddr.port}"
        for process in [server.process.pid, *ours]
        for listening in _listening(process)
        if not listening.laddr.ip.removeprefix("::ffff:").startswith("127.")
    ]
    assert not open_ports


def _listening(pid: int) -> list[object]:
    import psutil

    try:
        return [c for c in psutil.Process(pid).net_connections("tcp") if c.status == psutil.CONN_LISTEN]
    except psutil.NoSuchProcess:
        return []


def test_a_replica_that_dies_mid_stream_ends_its_streams_with_an_error_and_comes_back(server: Halftone) -> None:
    body = {"model": "storyteller@int8", "prompt": "Once", "max_tokens": 1000, "stream": True, "ignore_eos": True}
    with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=60) as answer:
        lines = answer.iter_lines()
        next(lines)
        server.worker("variant-int8").kill()
        rest = [line for line in lines if line]
    errors = [json.loads(line.removeprefix("data: "))["error"] for line in rest if '"error"' in line]
    assert errors
    assert errors[0]["code"] == "variant_unavailable"
    after = {**body, "max_tokens": 4, "stream": False}
    server.wait_until(
        lambda: httpx.post(f"{server.url}/v1/completions", json=after, timeout=90).status_code == 200, timeout_s=90
    )


def test_a_controller_that_dies_takes_neither_requests_nor_the_split_with_it(server: Halftone) -> None:
    weights = {"fp32": 100, "int8": 0, "broken": 0}
    assert httpx.put(f"{server.url}/admin/traffic", json={"weights": weights}).status_code == 200
    server.wait_until(lambda: server.metric("traffic_weight_ratio", variant="fp32") == 1)
    server.worker("controller").kill()
    body = {"model": "storyteller", "prompt": "Once", "max_tokens": 2}
    for _ in range(5):
        answer = httpx.post(f"{server.url}/v1/completions", json=body, timeout=30)
        assert (answer.status_code, answer.headers["x-halftone-variant"]) == (200, "fp32")
    server.wait_until(lambda: httpx.get(f"{server.url}/admin/variants", timeout=10).status_code == 200, timeout_s=60)
    server.wait_until(lambda: _weights(server) == weights, timeout_s=30)
    assert httpx.post(f"{server.url}/v1/completions", json=body).headers["x-halftone-variant"] == "fp32"


def _weights(server: Halftone) -> dict[str, float]:
    answer = httpx.get(f"{server.url}/admin/variants", timeout=10)
    return {row["name"]: row["weight"] for row in answer.json()["variants"]} if answer.status_code == 200 else {}


def test_an_ingress_that_dies_comes_back_on_its_port_and_no_counter_falls(server: Halftone) -> None:
    made = server.metric("generation_tokens_total", variant="fp32")
    assert made > 0
    server.worker("ingress").kill()
    server.wait_until(lambda: _is_ready(server), timeout_s=90)
    assert server.metric("generation_tokens_total", variant="fp32") >= made


def _is_ready(server: Halftone) -> bool:
    try:
        return httpx.get(f"{server.url}/ready", timeout=5).status_code == 200
    except httpx.TransportError:
        return False


def test_a_configuration_that_is_wrong_is_one_line(tmp_path: Path) -> None:
    config = tmp_path / "wrong.yaml"
    config.write_text('model: {name: x, source: "builtin:storyteller"}\nvariants: [{name: a, recipe: int9}]\n')
    server = Halftone(str(config))
    assert server.process.wait(60) == 1
    server.stop()
    assert server.said.count("\n") == 1
    assert "variants[0].recipe" in server.said


def test_the_small_trained_model_is_served_at_five_precisions_and_none_is_larger_than_the_one_before(
    shared: Path,
) -> None:
    recipes = ["fp32", "bf16", "int8", "int8-weight", "nf4"]
    options = [option for recipe in recipes for option in ("--recipe", recipe)]
    with Halftone(str(shared / "models/TinyStories-656K"), *options) as server:
        rows = server.announced["variants"]
        assert [row["variant"] for row in rows] == recipes
        assert {row["state"] for row in rows} == {"ready"}
        sizes = [row["weight_bytes"] for row in rows]
        assert sizes == sorted(sizes, reverse=True)
        for recipe in recipes:
            body = {"model": f"TinyStories-656K@{recipe}", "prompt": "Once upon a time", "max_tokens": 12}
            answer = httpx.post(f"{server.url}/v1/completions", json={**body, "temperature": 0}, timeout=60)
            assert answer.status_code == 200, answer.text
            assert answer.headers["x-halftone-variant"] == recipe


async def test_overload_is_a_429_that_says_when_to_come_back_and_ctrl_c_leaves_nothing(tmp_path: Path) -> None:
    config = tmp_path / "narrow.yaml"
    config.write_text(
        'model: {name: m, source: "builtin:storyteller"}\n'
        "variants: [{name: a, recipe: int8, engine: {max_num_seqs: 1, max_queue: 1}}]\n"
    )
    body = {"model": "m", "prompt": "Once", "max_tokens": 100, "ignore_eos": True}
    with Halftone(str(config)) as server:
        async with httpx.AsyncClient(timeout=120) as client:
            url = f"{server.url}/v1/completions"
            answers = await asyncio.gather(*(client.post(url, json=body) for _ in range(8)))
        refused = [answer for answer in answers if answer.status_code != 200]
        assert 0 < len(refused) < 8
        for answer in refused:
            assert answer.status_code == 429
            assert int(answer.headers["retry-after"]) >= 1
            assert answer.json()["error"]["code"] == "overloaded"
            assert answer.headers["x-halftone-variant"] == "a"
        left = await asyncio.to_thread(server.stop, signal.SIGINT)
        assert left == []
        assert server.process.returncode == 0


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
async def test_a_signal_lets_an_open_answer_finish_and_takes_no_new_one(how: signal.Signals) -> None:
    body = {"model": "storyteller", "prompt": "Once", "max_tokens": 400, "ignore_eos": True, "stream": True}
    with Halftone("builtin:storyteller", "--recipe", "bf16") as server:
        async with httpx.AsyncClient(timeout=120) as client:
            async with client.stream("POST", f"{server.url}/v1/completions", json=body) as answer:
                lines = answer.aiter_lines()
                await anext(lines)
                stopped = asyncio.create_task(asyncio.to_thread(server.stop, how))
                rest = [line async for line in lines if line]
            assert rest[-1] == "data: [DONE]"
            assert await stopped == []
            with pytest.raises(httpx.ConnectError):
                await client.get(f"{server.url}/health")
        assert server.process.returncode == 0
