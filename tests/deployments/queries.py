"""What deployments/ asks of Prometheus: every rule, alert and panel, as the expressions that stand there."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from serve import metrics

DEPLOYMENTS = Path(__file__).resolve().parents[2] / "deployments"
PROMETHEUS = DEPLOYMENTS / "prometheus"
DASHBOARD = DEPLOYMENTS / "grafana/dashboards/halftone.json"

COUNTED = {f"halftone_{metric.name}": metric for metric in metrics.METRICS}


def rules(name: str) -> list[dict[str, Any]]:
    return [rule for group in yaml.safe_load((PROMETHEUS / name).read_text())["groups"] for rule in group["rules"]]


def panels() -> Iterator[dict[str, Any]]:
    for panel in json.loads(DASHBOARD.read_text())["panels"]:
        yield from panel.get("panels", ())
        if panel["type"] != "row":
            yield panel


def metrics_in(expression: str) -> set[str]:
    """The names of the server's own metrics, without what Prometheus adds to a histogram's."""
    named = re.findall(r"\bhalftone_[a-z0-9_]+", expression)
    return {name if name in COUNTED else re.sub(r"_(bucket|sum|count)$", "", name) for name in named}


def recorded_in(expression: str) -> set[str]:
    return set(re.findall(r"\bhalftone:[a-z0-9_]+:[a-z0-9_]+", expression))
