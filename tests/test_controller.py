"""The controller merges what it is told, forgets the dead, and deals traffic that only ever adds up to all of it."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve import metrics
from serve.config import Config, parse_config
from serve.controller import Controller
from serve.errors import ConfigError, Conflict
from serve.heartbeat import IngressBeat, ReplicaBeat, State, serving
from serve.metrics import Recorder, VariantLabels
from serve.rollout import Batch, Split, kl_guard_nats

CONFIG: Config = parse_config(
    {
        "model": {"name": "m", "source": "builtin:storyteller"},
        "variants": [{"name": "bf16", "recipe": "bf16"}, {"name": "int8", "recipe": "int8"}],
        "traffic": {"weights": {"bf16": 60, "int8": 40}},
    }
)
INT8 = VariantLabels("m", "int8", "int8")


class Clock:
    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def controller(clock: Clock) -> Controller:
    return Controller(CONFIG, clock)


def replica(
    process: str, variant: str = "int8", state: State = "ready", tokens: int = 0, **more: object
) -> ReplicaBeat:
    recorder = Recorder()
    recorder.add(metrics.PREEMPTIONS, INT8, tokens)
    recorder.set(metrics.RUNNING, INT8, 1)
    return ReplicaBeat(process, variant, state, snapshot=recorder.snapshot(), **more)  # type: ignore[arg-type]


def ingress(process: str = "i", split: Split | None = None) -> IngressBeat:
    return IngressBeat(process, Batch(process, 1, 0.0), Recorder().snapshot(), split)


def test_energy_is_told_per_token_with_its_co2_and_stays_when_a_replica_dies(clock: Clock) -> None:
    controller = Controller(replace(CONFIG, co2_grams_per_kwh=360.0), clock)
    recorder = Recorder()
    recorder.add(metrics.ENERGY, INT8, 20.0)
    recorder.add(metrics.ENERGY_TOKENS, INT8, 100)
    controller.replica(ReplicaBeat("a", "int8", "ready", energy="RAPL package-0", snapshot=recorder.snapshot()))
    controller.replica(ReplicaBeat("c", "bf16", "ready", energy="unavailable: no counters"))
    bf16, int8 = (row["energy"] for row in controller.variants())
    assert int8 == {
        "measured": "RAPL package-0", "joules": 20.0, "tokens": 100.0, "joules_per_token": 0.2,
        "co2_grams_per_kwh": 360.0, "co2_grams_per_million_tokens": pytest.approx(20.0),
    }  # fmt: skip
    assert (bf16["joules"], bf16["joules_per_token"], bf16["measured"]) == (None, None, "unavailable: no counters")
    text = controller.metrics(ingress())
    assert 'halftone_energy_joules_total{model_name="m",precision="int8",variant="int8"} 20.0' in text
    assert 'halftone_energy_joules_total{model_name="m",precision="bf16"' not in text
    assert 'halftone_energy_co2_grams_per_kwh{model_name="m",precision="bf16",variant="bf16"} 360.0' in text
    clock.now_s += 100.0
    assert controller.variants()[1]["energy"]["joules"] == 20.0


def test_a_beat_that_was_overtaken_takes_nothing_back(controller: Controller) -> None:
    def beat(sequence: int, tokens: int) -> IngressBeat:
        recorder = Recorder()
        recorder.add(metrics.GENERATION_TOKENS, INT8, tokens)
        return IngressBeat("i", Batch("i", sequence, 0.0), recorder.snapshot())

    for sequence, tokens in ((1, 5), (3, 9), (2, 7)):
        controller.ingress(beat(sequence, tokens))
    assert 'generation_tokens_total{model_name="m",precision="int8",variant="int8"} 9.0' in controller.metrics(
        beat(3, 9)
    )


def states(controller: Controller) -> dict[str, str]:
    return {variant.name: variant.state for variant in controller.view().variants}


def test_a_variant_is_as_its_replicas_say(controller: Controller) -> None:
    assert states(controller) == {"bf16": "loading", "int8": "loading"}
    assert not controller.view().settled
    controller.replica(replica("a", "bf16", "failed", reason="no file"))
    controller.replica(replica("b", "int8", "ready", context_length=1024, fingerprint="f"))
    assert states(controller) == {"bf16": "failed", "int8": "ready"}
    assert controller.view().settled
    assert [(v.reason, v.context_length, v.fingerprint) for v in controller.view().variants] == [
        ("no file", None, None),
        (None, 1024, "f"),
    ]


def test_the_load_report_is_asked_for_until_it_has_come(controller: Controller) -> None:
    assert not controller.replica(replica("a", state="loading")).report_wanted
    assert controller.replica(replica("a")).report_wanted
    assert not controller.replica(replica("a", report={"load_s": 1.5})).report_wanted
    assert not controller.replica(replica("a")).report_wanted
    assert controller.variants()[1]["load_report"] == {"load_s": 1.5}


def test_the_silent_are_forgotten_and_their_counts_are_kept(controller: Controller, clock: Clock) -> None:
    controller.replica(replica("a", tokens=7))
    clock.now_s += 60
    assert states(controller)["int8"] == "loading"
    text = controller.metrics(ingress())
    assert 'num_preemptions_total{model_name="m",precision="int8",variant="int8"} 7.0' in text
    assert "num_requests_running{" not in text
    controller.replica(replica("a", tokens=8))
    assert 'num_preemptions_total{model_name="m",precision="int8",variant="int8"} 8.0' in controller.metrics(ingress())


def test_a_new_replica_takes_the_place_of_the_dead_one_at_once(controller: Controller, clock: Clock) -> None:
    controller.replica(replica("old"))
    clock.now_s += 1
    controller.replica(replica("new", state="loading"))
    assert states(controller)["int8"] == "loading"


def test_a_replica_that_has_just_started_is_cold_for_a_while(controller: Controller, clock: Clock) -> None:
    def cold() -> bool:
        return controller.view().variants[1].is_cold

    controller.replica(replica("known to the controller before this one"))
    assert not cold()
    clock.now_s += 10
    controller.replica(replica("new", state="loading"))
    clock.now_s += 10
    controller.replica(replica("new"))
    assert cold()
    clock.now_s += 10
    controller.replica(replica("new"))
    assert not cold()


def test_a_rollout_is_refused_with_the_arithmetic_where_memory_for_both_is_lacking(controller: Controller) -> None:
    needs = {"weights": 7_000_000_000, "kv_cache": 1_000_000_000}
    controller.replica(replica("a", "bf16", needs={"weights": 14_000_000_000}))
    assert "no replica yet" in controller.room_for("int8")
    controller.replica(replica("b", needs=needs, available_bytes=0))
    assert controller.room_for("int8").startswith("both are loaded: int8 takes 8 GB (weights 7 GB + kv_cache 1 GB)")
    controller.free(frozenset({"int8"}))
    assert not controller.replica(replica("b", needs=needs)).resident
    controller.replica(replica("b", state="freed", needs=needs, available_bytes=9_000_000_000))
    assert "9 GB are free" in controller.room_for("int8")
    controller.replica(replica("b", state="freed", needs=needs, available_bytes=5_500_000_000))
    with pytest.raises(Conflict, match=r"int8 needs 8 GB .*, 5\.5 GB are free; bf16 keeps 14 GB .*: 2\.5 GB short"):
        controller.room_for("int8")


def test_a_replica_that_says_goodbye_is_gone(controller: Controller) -> None:
    controller.replica(replica("a", leaving=True))
    assert states(controller)["int8"] == "loading"


def test_traffic_moves_by_one_revision_and_knows_its_variants(controller: Controller) -> None:
    view = controller.set_traffic({"int8": 100})
    assert view.split.weights == {"bf16": 0, "int8": 100}
    assert view.split.revision == 1
    with pytest.raises(ConfigError, match=r"traffic\.weights\.int9: unknown variant; allowed: bf16, int8"):
        controller.set_traffic({"bf16": 50, "int9": 50})
    with pytest.raises(ConfigError, match="sum to 100"):
        controller.set_traffic({"bf16": 50})
    assert controller.view().split.revision == 1


def test_a_new_controller_learns_the_split_from_an_ingress(clock: Clock) -> None:
    moved = CONFIG.split.moved({"bf16": 10, "int8": 90})
    controller = Controller(CONFIG, clock)
    assert controller.ingress(ingress(split=moved)).split == moved
    assert controller.ingress(ingress(split=CONFIG.split)).split == moved
    foreign = Split(stable="x", weights={"x": 100}, revision=9)
    assert controller.ingress(ingress(split=foreign)).split == moved


def test_the_weight_in_force_is_told_beside_the_configured_one(controller: Controller) -> None:
    controller.replica(replica("a", "bf16"))
    controller.replica(replica("b", "int8", "failed"))
    rows = controller.variants()
    assert [(row["weight"], row["serving_weight"]) for row in rows] == [(60, 100), (40, 0)]
    text = controller.metrics(ingress())
    assert 'traffic_weight_ratio{model_name="m",precision="bf16",variant="bf16"} 1.0' in text
    assert 'replicas{model_name="m",precision="int8",state="failed",variant="int8"} 1.0' in text


NAMES = ["a", "b", "c", "d"]
shares = st.lists(st.integers(0, 10), min_size=4, max_size=4).filter(any)


def test_every_variant_but_the_stable_one_tells_the_guard_of_its_precision(controller: Controller) -> None:
    text = controller.metrics(ingress())
    name = "halftone_drift_kl_divergence_guard_nats"
    assert f'{name}{{model_name="m",precision="int8",variant="int8"}} {kl_guard_nats("int8")}' in text
    assert text.count(f"{name}{{") == 1


def test_whichever_ingress_is_asked_answers_for_all(controller: Controller) -> None:
    beats = []
    for number, seconds in enumerate((0.0123, 0.4, 7.0)):
        recorder = Recorder()
        recorder.observe(metrics.TTFT, INT8, seconds, count=number + 1)
        recorder.add(metrics.GENERATION_TOKENS, INT8, 10**number)
        beats.append(IngressBeat(f"ingress {number}", Batch(f"ingress {number}", 1, 0.0), recorder.snapshot()))
        controller.ingress(beats[-1])
    labels = 'model_name="m",precision="int8",variant="int8"'
    for text in (controller.metrics(beat) for beat in beats):
        assert f"halftone_generation_tokens_total{{{labels}}} 111.0" in text
        assert f"halftone_time_to_first_token_seconds_sum{{{labels}}} 21.8123" in text
        assert f'halftone_time_to_first_token_seconds_bucket{{le="0.5",{labels}}} 3.0' in text


@given(shares=shares, stable=st.sampled_from(NAMES), ready=st.sets(st.sampled_from(NAMES)))
def test_what_is_dealt_is_all_of_it_and_only_to_the_ready(shares: list[int], stable: str, ready: set[str]) -> None:
    weights = {name: 100 * share / sum(shares) for name, share in zip(NAMES, shares, strict=True)}
    split = Split(stable=stable, weights=weights)
    dealt = serving(split, ready)
    if dealt is None:
        assert not any(weights[name] for name in ready - {stable})
        assert stable not in ready
        return
    assert math.isclose(sum(dealt.weights.values()), 100)
    assert all(name in ready for name, weight in dealt.weights.items() if weight)
    if stable in ready:
        assert all(dealt.weights[name] == weights[name] for name in ready - {stable})


@given(shares=shares, stable=st.sampled_from(NAMES), ready=st.sets(st.sampled_from(NAMES)))
def test_a_variant_of_weight_zero_serves_nobody_but_as_the_stable_one(
    shares: list[int], stable: str, ready: set[str]
) -> None:
    weights = {name: 100 * share / sum(shares) for name, share in zip(NAMES, shares, strict=True)}
    dealt = serving(Split(stable=stable, weights=weights), ready)
    for name in ready - {stable}:
        if dealt and not weights[name]:
            assert not dealt.weights[name]
