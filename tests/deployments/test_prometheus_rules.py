"""The rules and alerts that come with the server, held against its own metrics and run by Prometheus' own tool."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

import serve.errors
from serve import metrics
from serve.errors import ServiceError
from tests.deployments.queries import COUNTED, DEPLOYMENTS, PROMETHEUS, metrics_in, recorded_in, rules

HERE = Path(__file__).parent


def promtool(*arguments: object) -> str:
    tool = shutil.which("promtool")
    if tool is None:
        pytest.skip("no promtool on this machine (Debian's package prometheus)")
    done = subprocess.run([tool, *map(str, arguments)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_prometheus_takes_the_configuration_with_its_rules() -> None:
    said = promtool("check", "config", PROMETHEUS / "prometheus.yml")
    assert "SUCCESS: 2 rule files found" in said


def test_prometheus_computes_the_ratios_and_fires_the_alerts_that_are_meant() -> None:
    promtool("test", "rules", HERE / "rules_test.yml")


@pytest.mark.parametrize("name", ["rules.yml", "alerts.yml"])
def test_no_rule_asks_for_what_nobody_counts(name: str) -> None:
    recorded = {rule["record"] for rule in rules("rules.yml")}
    for rule in rules(name):
        assert metrics_in(rule["expr"]) <= COUNTED.keys()
        assert recorded_in(rule["expr"]) <= recorded
        assert metrics_in(rule["expr"]) or recorded_in(rule["expr"]) or "up{" in rule["expr"]


def test_every_alert_is_tested_and_told_what_to_do_about() -> None:
    tested = (HERE / "rules_test.yml").read_text()
    told = (DEPLOYMENTS.parent / "docs/OPERATIONS.md").read_text()
    for alert in rules("alerts.yml"):
        assert re.search(rf"alertname: {alert['alert']}\b", tested), f"{alert['alert']} is not tested"
        assert f"`{alert['alert']}`" in told
        assert alert["labels"]["severity"] in ("critical", "warning")


def test_failures_are_the_errors_that_are_not_the_callers_fault() -> None:
    (rule,) = [rule for rule in rules("rules.yml") if rule["record"] == "halftone:request_failures:rate5m"]
    (named,) = re.findall(r'code=~"([^"]+)"', rule["expr"])
    kinds = [kind for kind in vars(serve.errors).values() if isinstance(kind, type) and issubclass(kind, ServiceError)]
    assert set(named.split("|")) == {kind.code for kind in kinds}


def test_a_limit_of_goodput_is_an_edge_of_its_buckets() -> None:
    for rule in rules("rules.yml"):
        for name, edge in re.findall(r'(halftone_\w+)_bucket\{le="([^"]+)"\}', rule["expr"]):
            assert edge in map(str, COUNTED[name].buckets)
            assert f"{float(edge) * 1000:.0f}ms" in rule["record"]


def test_the_suffix_of_a_histogram_is_no_metric_of_its_own() -> None:
    assert metrics_in("rate(halftone_drift_kl_divergence_nats_bucket[5m]) > halftone_generation_tokens_total") == {
        f"halftone_{metrics.DRIFT_KL.name}",
        f"halftone_{metrics.GENERATION_TOKENS.name}",
    }
