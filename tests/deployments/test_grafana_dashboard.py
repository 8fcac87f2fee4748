"""The Grafana dashboard asks for what is counted, in PromQL that Prometheus reads."""

from __future__ import annotations

import json
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.deployments.queries import COUNTED, DASHBOARD, metrics_in, panels, recorded_in, rules
from tests.deployments.test_prometheus_rules import promtool

PANELS = list(panels())


def expressions() -> list[str]:
    return [target["expr"] for panel in PANELS for target in panel["targets"]]


def test_no_panel_asks_for_what_nobody_counts_or_records() -> None:
    recorded = {rule["record"] for rule in rules("rules.yml")}
    for expression in expressions():
        assert metrics_in(expression) <= COUNTED.keys()
        assert recorded_in(expression) <= recorded
        assert metrics_in(expression) or recorded_in(expression)


def test_every_recorded_ratio_can_be_seen() -> None:
    shown = {name for expression in expressions() for name in recorded_in(expression)}

    assert {rule["record"] for rule in rules("rules.yml") if ":ratio_" in rule["record"]} <= shown


def test_prometheus_reads_every_expression(tmp_path: Path) -> None:
    known = {"$model_name": "storyteller", "$variant": "bf16|int8"}
    recording = []
    for index, expression in enumerate(expressions()):
        for name, value in known.items():
            expression = expression.replace(name, value)
        assert "$" not in expression
        recording.append({"record": f"panel:{index}", "expr": expression})
    file = tmp_path / "panels.yml"
    file.write_text(yaml.safe_dump({"groups": [{"name": "panels", "rules": recording}]}))
    promtool("check", "rules", file)


def test_panels_are_named_measured_in_a_unit_and_do_not_cover_each_other() -> None:
    everything: list[dict[str, Any]] = json.loads(DASHBOARD.read_text())["panels"]
    assert len({panel["id"] for panel in everything}) == len(everything)
    for panel in PANELS:
        assert panel["title"]
        assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
        assert panel["type"] in ("table", "state-timeline") or panel["fieldConfig"]["defaults"]["unit"]
    for one, other in combinations((panel["gridPos"] for panel in everything), 2):
        apart = one["x"] + one["w"] <= other["x"] or other["x"] + other["w"] <= one["x"]
        assert apart or one["y"] + one["h"] <= other["y"] or other["y"] + other["h"] <= one["y"]


@pytest.mark.parametrize("name", ["datasource", "model_name", "variant"])
def test_what_a_query_leaves_open_can_be_chosen(name: str) -> None:
    assert name in {variable["name"] for variable in json.loads(DASHBOARD.read_text())["templating"]["list"]}
