"""Arrivals come at the rate and in the shape that were asked for, and the same again for the same seed."""

import itertools
import json
import random
from statistics import fmean, pstdev

import pytest

from loadtest.arrivals import constant, gamma, poisson, ramp, read_trace
from loadtest.errors import InputError, SettingsError
from loadtest.generator import schedule
from loadtest.lengths import Lengths
from loadtest.settings import Settings


def gaps(times, count=20_000):
    found = list(itertools.islice(times, count))
    return [later - earlier for earlier, later in itertools.pairwise(found)]


def settings(**values):
    return Settings.parse({"url": "http://h", "model": "m", **values})


def test_constant_arrivals_are_evenly_spaced():
    assert list(itertools.islice(constant(4.0), 4)) == [0.0, 0.25, 0.5, 0.75]


def test_poisson_gaps_have_the_mean_and_spread_of_an_exponential():
    found = gaps(poisson(5.0, random.Random(1)))
    assert fmean(found) == pytest.approx(0.2, rel=0.03)
    assert pstdev(found) / fmean(found) == pytest.approx(1.0, rel=0.05)


def test_bursty_gaps_keep_the_rate_and_come_in_clumps():
    found = gaps(gamma(5.0, 0.25, random.Random(1)))
    assert fmean(found) == pytest.approx(0.2, rel=0.06)
    assert pstdev(found) / fmean(found) == pytest.approx(2.0, rel=0.08)


def test_a_ramp_rises_linearly_and_brings_its_average():
    times = list(itertools.takewhile(lambda at_s: at_s < 100, ramp(1.0, 9.0, 100.0, constant(1.0))))
    assert len(times) == pytest.approx(500, abs=2)
    assert sum(at_s < 50 for at_s in times) == pytest.approx(150, abs=2)  # integral of 1 + 0.08 t


def test_a_ramp_that_falls_to_nothing_ends():
    assert len(list(ramp(10.0, 0.0, 10.0, constant(1.0)))) == pytest.approx(50, abs=2)


def test_processes_share_one_schedule_without_gap_or_overlap():
    one = settings(rate=20, num_requests=50, warmup="10")
    load = one.loads()[0]
    whole = list(schedule(one, load))
    assert len(whole) == 60
    shares = [list(itertools.islice(schedule(one, load), process, None, 3)) for process in range(3)]
    assert sorted(itertools.chain(*shares), key=lambda arrival: arrival.index) == whole


def test_a_duration_ends_the_schedule_after_the_warm_up_and_itself():
    one = settings(rate=50, duration=2, warmup="1s", arrivals="constant")
    assert len(list(schedule(one, one.loads()[0]))) == 150


def test_another_seed_gives_other_arrivals():
    first, second = (settings(rate=5, num_requests=5, seed=seed) for seed in (1, 2))
    assert list(schedule(first, first.loads()[0])) != list(schedule(second, second.loads()[0]))


def test_traces_of_three_kinds_are_replayed_from_zero(tmp_path):
    own, mooncake, azure = tmp_path / "own.jsonl", tmp_path / "mooncake.jsonl", tmp_path / "azure.csv"
    own.write_text('{"at_s": 12.0, "output_tokens": 3}\n\n{"at_s": 10.0}\n')
    rows = [{"timestamp": 2000 * n, "input_length": 10 + n, "output_length": n + 1} for n in range(3)]
    mooncake.write_text("\n".join(json.dumps(row) for row in rows))
    azure.write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.5,374,44\n2023-11-16 18:15:47.0,396,109\n"
    )
    assert [arrival.at_s for arrival in read_trace(own)] == [0.0, 2.0]
    assert read_trace(own)[1].output_tokens == 3
    assert [arrival.at_s for arrival in read_trace(mooncake, speed=2.0)] == [0.0, 1.0, 2.0]
    assert read_trace(mooncake)[2].prompt_tokens == 12
    assert [(arrival.at_s, arrival.prompt_tokens) for arrival in read_trace(azure)] == [(0.0, 374), (0.5, 396)]


def test_a_broken_trace_names_its_entry(tmp_path):
    trace = tmp_path / "trace.jsonl"
    trace.write_text('{"at_s": 1}\n{"when": 2}\n')
    with pytest.raises(InputError, match="entry 2"):
        read_trace(trace)


@pytest.mark.parametrize(
    ("text", "mean", "tolerance"),
    [
        ("128", 128, 0),
        ("uniform:64,256", 160, 3),
        ("normal:512,64", 512, 4),
        ("exponential:200", 200, 8),
        ("lognormal:100,0.5", 113, 3),
        ("choice:10,1000", 505, 20),
    ],
)
def test_lengths_have_the_mean_of_their_distribution(text, mean, tolerance):
    rng = random.Random(0)
    lengths = Lengths.parse(text)
    drawn = [lengths.draw(rng) for _ in range(10_000)]
    assert fmean(drawn) == pytest.approx(mean, abs=tolerance)
    assert min(drawn) >= 1


@pytest.mark.parametrize("text", ["", "many", "uniform:5", "uniform:9,3", "normal:1,2,3", "-4", "nan", "gauss:1,2"])
def test_a_wrong_length_names_the_shapes_there_are(text):
    with pytest.raises(SettingsError, match="lognormal:MEDIAN,SIGMA"):
        Lengths.parse(text)
