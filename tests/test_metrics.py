"""Numbers are exact across processes, and none ever falls."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from serve import metrics
from serve.metrics import METRICS, Ledger, Recorder, VariantLabels

INT8 = VariantLabels("storyteller", "int8", "int8")


def value(text: str, name: str, **labels: str) -> float:
    found = [
        sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name == name and labels.items() <= sample.labels.items()
    ]
    assert len(found) == 1, f"{name} {labels}: {found}"
    return found[0]


def test_histograms_of_two_processes_are_summed_exactly() -> None:
    ledger, values = Ledger(), {"a": [0.0123, 0.05], "b": [0.0123, 7.0, 0.001]}
    for process, seconds in values.items():
        recorder = Recorder()
        for second in seconds:
            recorder.observe(metrics.TTFT, INT8, second)
        ledger.update(process, recorder.snapshot())
    text = ledger.render()
    assert value(text, "halftone_time_to_first_token_seconds_count") == 5
    assert value(text, "halftone_time_to_first_token_seconds_sum") == pytest.approx(0.0123 * 2 + 7.051)
    assert value(text, "halftone_time_to_first_token_seconds_bucket", le="0.02") == 3
    assert value(text, "halftone_time_to_first_token_seconds_bucket", le="+Inf") == 5


def test_a_value_on_a_bucket_edge_belongs_to_that_bucket() -> None:
    recorder, ledger = Recorder(), Ledger()
    recorder.observe(metrics.ITL, INT8, 0.01, count=3)
    ledger.update("a", recorder.snapshot())
    assert value(ledger.render(), "halftone_inter_token_latency_seconds_bucket", le="0.01") == 3
    assert value(ledger.render(), "halftone_inter_token_latency_seconds_bucket", le="0.0075") == 0


@given(st.lists(st.tuples(st.integers(0, 5), st.sampled_from(["count", "send", "die", "again"])), max_size=80))
def test_no_counter_falls_whoever_dies_and_whatever_comes_twice(acts: list[tuple[int, str]]) -> None:
    ledger = Ledger()
    recorders = {number: Recorder() for number in range(6)}
    before = 0.0
    for number, act in acts:
        if act == "count":
            recorders[number].add(metrics.GENERATION_TOKENS, INT8, 1)
        elif act == "die":
            ledger.retire(str(number))
        else:
            ledger.update(str(number), recorders[number].snapshot())
        total = sum(ledger.total().values.values())
        assert total >= before
        before = total


def test_the_dead_beyond_memory_stay_in_the_total() -> None:
    ledger = Ledger()
    for number in range(200):
        recorder = Recorder()
        recorder.add(metrics.PROMPT_TOKENS, INT8, 10)
        recorder.observe(metrics.E2E, INT8, 1.0)
        ledger.update(str(number), recorder.snapshot())
        ledger.retire(str(number))
    text = ledger.render()
    assert value(text, "halftone_prompt_tokens_total") == 2000
    assert value(text, "halftone_e2e_request_latency_seconds_count") == 200
    assert len(ledger._dead) <= 64


def test_gauges_of_the_dead_go_and_ratios_are_not_summed() -> None:
    ledger = Ledger()
    for process, used in (("a", 0.25), ("b", 0.75)):
        recorder = Recorder()
        recorder.set(metrics.RUNNING, INT8, 2)
        recorder.set(metrics.KV_USAGE, INT8, used)
        ledger.update(process, recorder.snapshot())
    assert value(ledger.render(), "halftone_num_requests_running") == 4
    assert value(ledger.render(), "halftone_kv_cache_usage_ratio") == 0.75
    ledger.retire("b")
    assert value(ledger.render(), "halftone_num_requests_running") == 2
    assert value(ledger.render(), "halftone_kv_cache_usage_ratio") == 0.25


def test_a_snapshot_stands_still_while_counting_goes_on() -> None:
    recorder = Recorder()
    recorder.observe(metrics.TTFT, INT8, 1.0)
    taken = recorder.snapshot()
    recorder.observe(metrics.TTFT, INT8, 1.0)
    recorder.add(metrics.PROMPT_TOKENS, INT8)
    assert sum(next(iter(taken.histograms.values())).counts) == 1
    assert not taken.values


def test_declared_series_begin_at_zero() -> None:
    recorder, ledger = Recorder(), Ledger()
    recorder.declare(INT8, METRICS)
    ledger.update("a", recorder.snapshot())
    assert value(ledger.render(), "halftone_generation_tokens_total", variant="int8") == 0
    assert value(ledger.render(), "halftone_time_to_first_token_seconds_count", variant="int8") == 0


def test_every_code_and_result_that_is_known_begins_at_zero() -> None:
    recorder, ledger = Recorder(), Ledger()
    recorder.declare(INT8, METRICS)
    ledger.update("a", recorder.snapshot())
    text = ledger.render()
    for metric in METRICS:
        for known in metric.values:
            assert value(text, f"halftone_{metric.name}", **{metric.extra[0]: known}) == 0


def test_a_counter_that_something_else_counts_anew_grows_by_what_that_grew() -> None:
    recorder, ledger = Recorder(), Ledger()
    for total in (3.0, 5.0, 5.0, 1.0, 4.0):  # a model that was freed and loaded again counts from zero
        recorder.follow(metrics.PREEMPTIONS, INT8, total)
    ledger.update("a", recorder.snapshot())
    assert value(ledger.render(), "halftone_num_preemptions_total") == 9
    assert ledger.value(metrics.PREEMPTIONS, INT8) == 9
    ledger.retire("a")
    assert ledger.value(metrics.PREEMPTIONS, INT8) == 9
    assert ledger.value(metrics.ENERGY, INT8) is None


@pytest.mark.parametrize("metric", METRICS, ids=lambda metric: metric.name)
def test_names_end_in_their_unit_and_buckets_rise(metric: metrics.Metric) -> None:
    assert metric.name.endswith("_total") == (metric.kind == "counter")
    assert bool(metric.buckets) == (metric.kind == "histogram")
    assert all(a < b for a, b in zip(metric.buckets, metric.buckets[1:], strict=False))
    assert math.inf not in metric.buckets
