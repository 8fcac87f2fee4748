"""Drift, shadow traffic and experiments on a real local Ray cluster: true numbers, a damaged variant seen, users first.

One server for all tests of this file, which follow one another; each deals the traffic that it needs.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from serve.compression.artifact import default_root
from serve.compression.recipe import Recipe
from serve.compression.source import find_source
from serve.evaluation.served import served_logits
from serve.kernels import unavailable
from serve.loading import load
from serve.quality import Divergence, LogitSource, TokenScores, score_rows
from tests.running import ROOT, Halftone

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(400)]

RECIPES = {"bf16": "bf16", "int8": "int8", "nf4": "nf4", "gptq4": "gptq4", "damaged": "int8"}
NARROW = "engine: {max_num_seqs: 8, max_queue: 16, max_num_batched_tokens: 128}"
CONFIG = f"""
model: {{name: storyteller, source: "builtin:storyteller"}}
variants:
  - {{name: bf16, recipe: bf16, {NARROW}}}
  - {{name: int8, recipe: int8, {NARROW}}}
  - {{name: nf4, recipe: nf4, {NARROW}}}
  - {{name: gptq4, recipe: gptq4, {NARROW}}}
  - {{name: damaged, recipe: int8, source: DAMAGED, {NARROW}}}
traffic: {{stable: bf16, weights: {{bf16: 0, int8: 25, nf4: 25, gptq4: 25, damaged: 25}}}}
drift: {{reference: bf16, sample_rate: 1.0}}
"""
STORIES = [
    json.loads(line)["text"].split() for line in (ROOT / "serve/storyteller/calibration.jsonl").read_text().splitlines()
]


@dataclass(frozen=True)
class Answer:
    status: int
    variant: str
    ids: tuple[int, ...]
    """Prompt and answer."""
    prompt_tokens: int
    said: str = ""
    """If it was refused."""
    user: str = ""


@dataclass
class Users:
    """They ask again and again, each as soon as its last answer has come, until they have asked `requests` together.

    first: the number of the first request, which says what it asks.
    """

    url: str
    users: int = 6
    requests: int = 10**9
    first: int = 0
    tokens: int = 24
    seen: list[Answer] = field(default_factory=list)
    _stop: threading.Event = field(default_factory=threading.Event)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _asked: int = 0

    def __enter__(self) -> Users:
        self._client = httpx.Client(timeout=60, limits=httpx.Limits(max_connections=self.users))
        self._threads = [threading.Thread(target=self._ask) for _ in range(self.users)]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.requests == Users.requests:
            self._stop.set()
        for thread in self._threads:
            thread.join()
        self._client.close()

    @property
    def statuses(self) -> Counter[int]:
        return Counter(answer.status for answer in self.seen)

    def _ask(self) -> None:
        while not self._stop.is_set():
            with self._lock:
                number, self._asked = self._asked, self._asked + 1
            if number >= self.requests:
                return
            body = self._body(self.first + number)
            answer = _answer(self._client.post(f"{self.url}/v1/completions", json=body))
            self.seen.append(replace(answer, user=body["user"]))

    def _body(self, number: int) -> dict[str, Any]:
        """Long and short, drawn at several temperatures or not at all, each by a user of its own."""
        return {
            "model": "storyteller",
            "prompt": " ".join(STORIES[number % len(STORIES)][: 4 + number % 37]),
            "max_tokens": self.tokens * (1 + number % 3),
            "temperature": (0.0, 0.7, 1.0)[number % 3],
            "seed": number,
            "user": f"user {number}",
            "ignore_eos": True,
            "return_token_ids": True,
        }


class Regulars(Users):
    """Eighty people who come again and again."""

    def _body(self, number: int) -> dict[str, Any]:
        return {**super()._body(number), "user": f"regular {number % 80}"}


def _answer(response: httpx.Response) -> Answer:
    variant = response.headers.get("x-halftone-variant", "")
    if response.status_code != 200:
        assert response.status_code != 429 or int(response.headers["retry-after"]) >= 1
        return Answer(response.status_code, variant, (), 0, response.text)
    (choice,) = response.json()["choices"]
    prompt = choice["prompt_token_ids"]
    return Answer(200, variant, (*prompt, *choice["token_ids"]), len(prompt))


@pytest.fixture(scope="module")
def damaged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded model, one layer's weights 1.3 times as large: its int8 has the same codes, and scales x 1.3."""
    from safetensors.torch import load_file, save_file

    folder = tmp_path_factory.mktemp("damaged") / "checkpoint"
    shutil.copytree(find_source("builtin:storyteller"), folder)
    (file,) = folder.glob("*.safetensors")
    weights = load_file(file)
    hit = [name for name in weights if ".layers.3." in name and "proj" in name]
    assert len(hit) == 7
    save_file({**weights, **{name: weights[name] * 1.3 for name in hit}}, file, {"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def server(damaged: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Halftone]:
    config = tmp_path_factory.mktemp("server") / "config.yaml"
    config.write_text(CONFIG.replace("DAMAGED", str(damaged)))
    with Halftone(str(config)) as running:
        yield running


def samples(server: Halftone, **labels: str) -> float:
    return server.metric("drift_samples_total", **labels)


def deal(server: Halftone, shadow: Mapping[str, float] | None = None, **weights: float) -> None:
    """From the next request on: every ingress asks for the split at once when it has changed it."""
    body = {"weights": {**dict.fromkeys(RECIPES, 0), **weights}, "shadow": dict(shadow or {})}
    httpx.put(f"{server.url}/admin/traffic", json=body).raise_for_status()


@dataclass(frozen=True)
class Live:
    """What /metrics says of one variant's drift."""

    kl_nats: float
    agreement: float
    ln_perplexity_ratio: float
    guard_nats: float
    tokens: float

    @classmethod
    def of(cls, server: Halftone, variant: str) -> Live:
        def metric(name: str) -> float:
            return server.metric(f"drift_{name}", variant=variant)

        tokens, fair = metric("tokens_total"), metric("nll_tokens_total")
        nats = metric("nll_variant_nats_total") - metric("nll_reference_nats_total")
        return cls(
            kl_nats=metric("kl_divergence_nats_sum") / tokens,
            agreement=metric("top1_agreements_total") / tokens,
            ln_perplexity_ratio=nats / fair,
            guard_nats=metric("kl_divergence_guard_nats"),
            tokens=tokens,
        )


def evaluated(served: list[Answer], reference: LogitSource, variant: LogitSource) -> tuple[Divergence, Divergence]:
    """Both models over what was served, as `halftone evaluate` compares them: over the answers, over the prompts."""
    parts, answered = [], []
    for number, answer in enumerate(served):
        ids, known = answer.ids, len(answer.ids) - 1
        parts.append(score_rows(reference(ids)[:known], variant(ids)[:known], torch.tensor(ids[1:]), number))
        answered.append(torch.arange(1, len(ids)) >= answer.prompt_tokens)
    scores, answer_tokens = TokenScores.join(parts), torch.cat(answered)
    return Divergence.of(scores.select(answer_tokens)), Divergence.of(scores.select(~answer_tokens))


def as_evaluated(variant: str, damaged: Path) -> LogitSource:
    """The variant in this process, as `halftone evaluate` runs it."""
    source = str(damaged) if variant == "damaged" else "builtin:storyteller"
    return served_logits(load(source, Recipe.parse(RECIPES[variant]), artifacts=default_root()))


def test_live_drift_is_what_evaluating_the_served_text_gives_and_shows_a_damaged_variant(
    server: Halftone, damaged: Path
) -> None:
    seen: list[Answer] = []
    for sent in (30, 60, 90, 120):
        # So few at a time that each finds room to be scored, however slow the machine is.
        with Users(server.url, users=2, requests=30, first=len(seen)) as users:
            pass
        seen += users.seen
        server.wait_until(lambda expected=sent: samples(server) == expected)
    assert {answer.status for answer in seen} == {200}
    results = {
        result: samples(server, result=result) for result in ("scored", "shed", "no_data", "unfinished", "failed")
    }
    assert results["scored"] == 120, results
    live = {name: Live.of(server, name) for name in RECIPES if name != "bf16"}

    reference = as_evaluated("bf16", damaged)
    # A plain pass rounds between its layers; by compiled steps the two are the same to the last digit.
    within = 0.02 if unavailable() is None else 0.1
    for name, drift in live.items():
        served = [answer for answer in seen if answer.variant == name]
        assert len(served) <= 100
        assert drift.tokens == sum(len(answer.ids) - answer.prompt_tokens for answer in served)
        answers, prompts = evaluated(served, reference, as_evaluated(name, damaged))
        assert drift.kl_nats == pytest.approx(answers.kl_divergence.mean, rel=within), name
        assert drift.agreement == pytest.approx(answers.top1_agreement, abs=0.02), name
        assert drift.ln_perplexity_ratio == pytest.approx(prompts.mean_ln_ratio, rel=0.1, abs=0.01), name

    assert live["int8"].kl_nats < live["gptq4"].kl_nats <= live["nf4"].kl_nats
    for name in ("int8", "gptq4", "nf4"):
        assert live[name].kl_nats < live[name].guard_nats
    # int8 with one layer's scales x 1.3.
    assert live["damaged"].guard_nats == live["int8"].guard_nats
    assert live["damaged"].kl_nats > 3 * live["damaged"].guard_nats
    assert live["damaged"].kl_nats > 10 * live["int8"].kl_nats


def test_a_killed_reference_costs_users_nothing_and_drift_says_no_data_until_it_is_back(server: Halftone) -> None:
    deal(server, int8=40, nf4=30, gptq4=30)
    missing, scored = samples(server, result="no_data"), samples(server, result="scored")
    with Users(server.url, users=4, tokens=8) as users:
        server.wait_until(lambda: samples(server, result="scored") > scored + 10)
        server.worker("variant-bf16").kill()
        server.wait_until(lambda: samples(server, result="no_data") > missing + 10)
        server.wait_until(lambda: server.metric("replicas", variant="bf16", state="ready") == 1, 90)
        scored = samples(server, result="scored")
        server.wait_until(lambda: samples(server, result="scored") > scored + 10)
    assert [answer for answer in users.seen if answer.status != 200] == []


def test_a_saturated_server_sheds_shadows_and_drift_first_and_counts_them(server: Halftone) -> None:
    deal(server, {"nf4": 1.0}, int8=100)
    server.wait_until(lambda: not server.metric("num_requests_running"))
    drawn = samples(server, variant="int8")
    with Users(server.url, users=2, requests=20, tokens=8):
        pass
    server.wait_until(lambda: server.metric("shadow_requests_total", result="compared") >= 10)
    assert server.metric("shadow_requests_total", result="shed") == 0
    shed = samples(server, variant="int8", result="shed")

    with Users(server.url, users=14, tokens=8) as waiting:  # 8 run, 6 wait: none is refused
        server.wait_until(lambda: server.metric("num_requests_waiting", variant="int8") > 0)
        server.wait_until(lambda: server.metric("shadow_requests_total", result="shed") > 20)
        server.wait_until(lambda: samples(server, variant="int8", result="shed") > shed + 20)
    assert set(waiting.statuses) == {200}
    with Users(server.url, users=64, requests=96, tokens=128) as refused:  # long ones pile up on any machine
        pass
    assert set(refused.statuses) == {200, 429}
    sent = 20 + len(waiting.seen) + len(refused.seen)
    server.wait_until(lambda: server.metric("shadow_requests_total", variant="nf4") == sent)
    server.wait_until(lambda: samples(server, variant="int8") == drawn + sent)


# -- experiments -----------------------------------------------------------------------------------------------------


def command(server: Halftone, *words: str) -> dict[str, Any]:
    """`halftone experiment ... --json`, as an operator types it."""
    line = [sys.executable, "-m", "serve", "experiment", *words, "--url", server.url, "--json"]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout))


def one(server: Halftone, model: str, number: int) -> Answer:
    body = {"model": model, "prompt": "Once", "max_tokens": 2, "user": f"regular {number}", "return_token_ids": True}
    return _answer(httpx.post(f"{server.url}/v1/completions", json=body, timeout=60))


def reported(server: Halftone) -> list[dict[str, Any]]:
    """The rows of the experiment's report; none while nobody answers."""
    answer = httpx.get(f"{server.url}/admin/experiments/winter/report", timeout=10)
    return list(answer.json()["variants"]) if answer.status_code == 200 else []


def counted(server: Halftone) -> int:
    return sum(row["n"] for row in reported(server))


def intervals(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Those that traffic of half a minute can give."""
    return [row[measure][kind] for measure in ("ttft_s", "itl_s", "e2e_s") for kind in ("mean", "p50")]


def test_an_experiment_keeps_its_users_and_its_counts_when_the_controller_dies(server: Halftone) -> None:
    deal(server, bf16=100)
    weights = {"bf16": 50.0, "int8": 30.0, "nf4": 20.0}
    options = [word for name, weight in weights.items() for word in ("--weight", f"{name}={weight:g}")]
    options += ["--holdout", "10", "--price", "1.2", "--settle", "0", "--block", "1"]
    assert command(server, "start", "winter", *options)["state"] == "running"
    # Whoever looks has the ingress deal by it at once; otherwise it does from its next report on.
    assert httpx.get(f"{server.url}/admin/traffic").json()["weights"]["bf16"] == 50
    assert any(one(server, "storyteller", n).variant != "bf16" for n in range(12))
    with Regulars(server.url, users=4, tokens=8) as users:
        assert [one(server, "storyteller@gptq4", number).variant for number in range(5)] == ["gptq4"] * 5
        time.sleep(12)  # it writes down what it has counted every ten seconds
        before = counted(server)
        server.worker("controller").kill()
        server.wait_until(lambda: counted(server) > before + 40, 60)
        server.wait_until(lambda: all(i["high"] is not None for row in reported(server) for i in intervals(row)), 120)
    assert users.statuses == {200: len(users.seen)}
    # Each keeps to one variant, across the death, and nobody met one without a share.
    dealt: dict[str, set[str]] = {}
    for answer in users.seen:
        dealt.setdefault(answer.user, set()).add(answer.variant)
    assert {len(variants) for variants in dealt.values()} == {1}
    assert set().union(*dealt.values()) == set(weights)

    told = command(server, "report", "winter")
    experiment, split, left_out = told["experiment"], told["split"], told["left_out"]
    assert (experiment["state"], experiment["holdout"], experiment["price_per_hour"]) == ("running", 10, 1.2)
    assert {name: weight for name, weight in experiment["weights"].items() if weight} == weights
    assert (split["unit"], split["matches"]) == ("users", True), split
    assert sum(arm["units"] for arm in split["arms"]) <= 80
    assert left_out["pinned"] == 5
    assert 0 < left_out["held_out"] < len(users.seen) / 2
    rows = {row["variant"]: row for row in told["variants"]}
    assert set(rows) == set(weights)
    for name, row in rows.items():
        assert row["n"] >= 50
        assert row["units"] <= sum(variants == {name} for variants in dealt.values())
        for interval in intervals(row):
            assert 0 <= interval["low"] <= interval["estimate"] <= interval["high"], (name, interval)
        assert row["error_rate"]["estimate"] == 0 < row["error_rate"]["high"]
        cost = 1.2 / 3600 / row["tokens_per_s"] * 1e6
        assert row["cost_per_million_tokens"] == pytest.approx(cost)
        assert row["cost_per_million_tokens_busy"] < cost
        assert row["memory_bytes"]["weights"] > 0
        assert row["at_common_mix"]["coverage_ratio"] > 0
        assert name == "bf16" or row["drift"]["kl_divergence_nats"]["estimate"] > 0
    assert len({stratum["prompt_tokens"] for stratum in told["strata"]}) > 1
    assert len({stratum["running_sequences"] for stratum in told["strata"]}) > 1
    assert {(row["variant"], row["measure"]) for row in told["comparisons"]} >= {("int8", "itl"), ("nf4", "ttft")}

    assert command(server, "stop", "winter")["stopped_by"] == "operator"
    was = {**dict.fromkeys(RECIPES, 0), "bf16": 100}
    assert httpx.get(f"{server.url}/admin/traffic").json()["weights"] == was
    assert command(server, "list")["active"] is None
