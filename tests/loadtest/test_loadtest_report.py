"""Results are compared by interval, and reported as a page that needs nothing else."""

import json
import re

import pytest

from loadtest.compare import Estimate


@pytest.fixture(scope="module")
def results(tmp_path_factory, server, start_server):
    """Two results of one server, the second 40 ms slower; the first a sweep with two variants."""
    import subprocess
    import sys
    from pathlib import Path

    folder = tmp_path_factory.mktemp("results")
    loads = {"fast": ("--concurrency", "2,4,8"), "slow": ("--concurrency", "8"), "again": ("--concurrency", "8")}
    for name, load in loads.items():
        ttft = 0.09 if name == "slow" else 0.05
        fake = {"run": name, "ttft": {"lognormal": [ttft, 0.05]}, "tokens": 2, "variants": ["bf16", "int8"]}
        where = ("--url", server.url, "--model", name, "--extra-body", json.dumps({"fake": fake}))
        command = [sys.executable, "-m", "loadtest", "run", *where, *load, "--num-requests", "160"]
        command += ["--output", str(folder / f"{name}.json"), "--quiet", "--slo", "ttft_s=0.5"]
        done = subprocess.run(command, capture_output=True, cwd=Path(__file__).parent.parent.parent)
        assert done.returncode == 0, done.stderr
    return folder


def rows_of(outcome):
    return {(row["group"], row["metric"], row["statistic"]): row for row in outcome.result["rows"]}


def test_a_real_difference_is_found_and_its_size_is_right(loadtest, results):
    outcome = loadtest("compare", results / "again.json", results / "slow.json", "--json")
    row = rows_of(outcome)["overall", "ttft_s", "p50"]
    assert row["verdict"] == "worse"
    assert row["change_ratio"] == pytest.approx(0.8, abs=0.4)
    assert row["interval"][0] < row["change_ratio"] < row["interval"][1]
    assert rows_of(outcome)["overall", "ttft_s", "p99"]["verdict"] == "too few samples"
    assert ("int8", "e2e_s", "mean") in rows_of(outcome)


def test_a_result_differs_from_itself_in_nothing(loadtest, results):
    outcome = loadtest("compare", results / "slow.json", results / "slow.json", "--json")
    assert outcome.result["worse"] == outcome.result["better"] == 0
    assert outcome.result["settings_that_differ"] == {}


def test_a_regression_fails_a_build(loadtest, results):
    pair = ("compare", results / "again.json", results / "slow.json")
    assert loadtest(*pair).exit_code == 0
    assert loadtest(*pair, "--fail-if-worse").exit_code == 1


def test_a_drift_between_runs_of_a_side_is_no_difference_between_sides(loadtest, results):
    pair = (results / "again.json", results / "slow.json")
    more = loadtest("compare", *pair, "--more-a", results / "slow.json", "--more-b", pair[1], "--json")
    assert more.result["runs"] == [2, 2]
    assert rows_of(more)["overall", "ttft_s", "p50"]["verdict"] == "no difference seen", "one run of A was as slow"


def test_several_runs_are_their_median_within_the_bounds_of_all():
    runs = [Estimate(1.0, (0.9, 1.2)), Estimate(3.0, (2.0, 3.5)), Estimate(1.5, (1.1, 1.6))]
    assert Estimate.over(runs) == Estimate(1.5, (0.9, 3.5))
    assert Estimate.over([*runs, Estimate(1.0, None)]).interval is None


def test_two_variants_of_one_result_are_compared(loadtest, results):
    pair = (results / "slow.json", results / "slow.json", "--a-variant", "bf16", "--b-variant", "int8")
    outcome = loadtest("compare", *pair, "--json")
    assert {row["group"] for row in outcome.result["rows"]} == {"bf16 → int8"}
    for option in ("--a-variant", "--b-variant"):
        wrong = loadtest("compare", *pair[:2], option, "fp4")
        assert wrong.exit_code == 2
        assert "bf16, int8" in wrong.stderr


def test_the_page_needs_nothing_else_and_the_plots_are_written(loadtest, results, tmp_path):
    page, folder = tmp_path / "page.html", tmp_path / "png"
    outcome = loadtest("report", results / "fast.json", results / "slow.json", "--out", page, "--png", folder)
    assert outcome.exit_code == 0, outcome.stderr
    text = page.read_text()
    assert "<script" not in text
    sources = re.findall(r'(?:src|href)="([^"]{0,30})', text)
    assert len(sources) == 2 + 3 + 1, "latency, throughput, three stages and one timeline"
    assert all(source.startswith("data:image/svg+xml;base64,") for source in sources)
    assert "int8: TTFT" in text
    names = {path.name for path in folder.iterdir()}
    assert {"latency.png", "throughput.png", "timeline-0-2.png", "timeline-1-0.png"} <= names


def test_a_sweep_names_its_stages_and_its_findings(results):
    result = json.loads((results / "fast.json").read_text())
    assert [stage["offered"]["concurrency"] for stage in result["stages"]] == [2, 4, 8]
    assert result["highest_meeting_slo"]["stage"] == 2
    assert result["knee"] is not None
    assert result["overall"] == result["stages"][result["headline_stage"]]["overall"]


def test_what_is_no_result_is_refused(loadtest, tmp_path):
    wrong = tmp_path / "x.json"
    wrong.write_text('{"kind": "loadtest.engine"}')
    outcome = loadtest("report", wrong)
    assert outcome.exit_code == 2
    assert "loadtest.engine" in outcome.stderr
