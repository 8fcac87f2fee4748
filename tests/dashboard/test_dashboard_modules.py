"""The page's arithmetic, run in the browser and held against Python's own."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from serve import metrics
from serve.api import ApiSettings
from serve.metrics import Ledger, Recorder, VariantLabels
from tests.dashboard.conftest import playwright, serving

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def blank(browser: playwright.Browser) -> Iterator[playwright.Page]:
    """A page of this server without the dashboard's own scripts running: it may import them."""
    with serving(ApiSettings()) as server, browser.new_context() as context:
        page = context.new_page()
        page.goto(f"{server.url}/dashboard/icon.svg")
        yield page


def call(page: playwright.Page, module: str, function: str, *arguments: Any) -> Any:
    script = "async ([module, name, values]) => (await import(`/dashboard/${module}`))[name](...values)"
    return page.evaluate(script, [module, function, list(arguments)])


def exported() -> tuple[Recorder, str]:
    recorder = Recorder()
    labels = VariantLabels('tale "one"\\two', "int8", "int8\nline")
    recorder.declare(labels, metrics.METRICS)
    draw = random.Random(7)
    for _ in range(500):
        recorder.observe(metrics.TTFT, labels, draw.expovariate(5))
    recorder.add(metrics.ERRORS, labels, 3, "overloaded")
    recorder.set(metrics.KV_USAGE, labels, 0.125)
    ledger = Ledger()
    ledger.update("one", recorder.snapshot())
    return recorder, ledger.render()


def test_metrics_are_read_as_prometheus_reads_them(blank: playwright.Page) -> None:
    _, text = exported()
    script = "async (text) => [...(await import('/dashboard/prometheus.js')).parse(text)]"
    read = {
        (name, tuple(sorted(sample["labels"].items())), sample["value"])
        for name, samples in blank.evaluate(script, text)
        for sample in samples
    }
    meant = {
        (sample.name, tuple(sorted(sample.labels.items())), sample.value)
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }
    assert read == meant
    assert len(read) > 100


@pytest.mark.parametrize("q", [0.01, 0.5, 0.9, 0.99, 1.0])
def test_a_quantile_lies_in_the_bucket_of_the_true_one(blank: playwright.Page, q: float) -> None:
    edges = [*metrics.TTFT.buckets, float("inf")]
    values = sorted(random.Random(3).expovariate(5) for _ in range(500))
    counts = [sum(value <= edge for value in values) for edge in edges]
    script = """async ([edges, counts, q]) => (await import('/dashboard/prometheus.js'))
        .quantile({edges: [...edges, Infinity], counts, sum: 0}, q)"""
    found = blank.evaluate(script, [edges[:-1], counts, q])
    true = values[max(0, int(q * len(values)) - 1)]
    below = max((edge for edge in edges if edge < true), default=0.0)
    above = min(edge for edge in edges if edge >= true)
    assert below <= found <= above


def test_the_split_sums_to_100_whatever_is_moved(blank: playwright.Page) -> None:
    draw = random.Random(11)
    weights: dict[str, float] = {"bf16": 100, "int8": 0, "nf4": 0, "gptq4": 0}
    for _ in range(200):
        name, value = draw.choice(list(weights)), draw.choice([0, 100, draw.randint(0, 100)])
        weights = call(blank, "weights.js", "rebalanced", weights, name, value, "bf16")
        assert sum(weights.values()) == 100
        assert weights[name] == value
        assert min(weights.values()) >= 0


def test_what_is_taken_away_falls_to_the_stable_variant(blank: playwright.Page) -> None:
    dealt = call(blank, "weights.js", "rebalanced", {"bf16": 0, "int8": 100, "nf4": 0}, "int8", 40, "bf16")
    assert dealt == {"bf16": 60, "int8": 40, "nf4": 0}
    assert call(blank, "weights.js", "rebalanced", {"bf16": 100}, "bf16", 30, "bf16") == {"bf16": 100}


def test_only_points_that_none_beats_are_on_the_front(blank: playwright.Page) -> None:
    points = [{"x": 1, "y": 5}, {"x": 2, "y": 4}, {"x": 3, "y": 9}, {"x": 4, "y": 9}]
    script = """async ([points, lower]) => {
        globalThis.uPlot = class {};
        return (await import('/dashboard/charts.js')).paretoFront(points, lower).map((point) => point.x);
    }"""
    assert blank.evaluate(script, [points, False]) == [1, 3]
    assert blank.evaluate(script, [points, True]) == [1, 2]


@pytest.mark.parametrize(
    ("function", "value", "text"),
    [
        ("duration", 0.00042, "0.42 ms"),
        ("duration", 0.0123, "12.3 ms"),
        ("duration", 1.5, "1.5 s"),
        ("duration", 600, "10 min"),
        ("bytes", 999, "999 B"),
        ("bytes", 7_475_712, "7.13 MiB"),
        ("bytes", 3 * 2**30, "3 GiB"),
        ("percent", 0.125, "12.5 %"),
        ("percent", 0.00001, "<0.01 %"),
        ("percent", None, "–"),
        ("number", 0.0254, "0.0254"),
        ("number", 1234.5, "1,235"),
        ("count", 12345, "12,345"),
    ],
)
def test_numbers_carry_their_unit(blank: playwright.Page, function: str, value: float | None, text: str) -> None:
    assert call(blank, "format.js", function, value) == text


def test_a_character_in_several_tokens_appears_with_its_last(blank: playwright.Page) -> None:
    script = """async (names) => {
        const spelling = new (await import('/dashboard/loupe/answer.js')).Spelling();
        return names.map((name) => spelling.next(name));
    }"""
    names = ["a", "bytes:\\xf0\\x9f", "bytes:\\xa6\\x8a", " fox", "bytes:\\xf0", "b"]
    assert blank.evaluate(script, names) == ["a", "", "🦊", " fox", "", "\ufffdb"]


def test_what_is_kept_is_bounded_however_long_the_page_stays_open(blank: playwright.Page) -> None:
    script = """async () => {
        const { History } = await import('/dashboard/history.js');
        const { Recorder } = await import('/dashboard/recorder.js');
        const [history, recorder, variants] = [new History(), new Recorder(5, () => 1), [{name: 'bf16'}]];
        const look = (second) => ({atMs: second * 1000, variants: []});
        for (let second = 1; second <= 5000; second += 1) {
            history.push(look(second));
            recorder.record({snapshot: look(second), recent: () => ({bf16: {}})}, variants);
        }
        return [history.seconds, ...recorder.data(variants).map((column) => column.length)];
    }"""
    assert blank.evaluate(script) == [999, 900, 900]
