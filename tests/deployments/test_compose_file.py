"""compose.yaml: its shape by the compose specification's own schema, and everything that it points at exists."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from serve.config import load_config
from tests.deployments.queries import DEPLOYMENTS, PROMETHEUS

FILE = DEPLOYMENTS / "compose.yaml"
SERVICES: dict[str, Any] = yaml.safe_load(FILE.read_text())["services"]


def mounts(service: str) -> dict[str, Path]:
    """Where in the container each file or folder of this repository lies."""
    found = {}
    for volume in SERVICES[service]["volumes"]:
        source, target, *_ = volume.replace("${HALFTONE_CONFIG:-./local.yaml}", "./local.yaml").split(":")
        if source.startswith("."):
            found[target] = DEPLOYMENTS / source
    return found


def seen_in(service: str, path: str) -> Path:
    """The file here that the container sees under that path."""
    for target, source in mounts(service).items():
        if path == target or path.startswith(f"{target}/"):
            return source / path.removeprefix(target).lstrip("/")
    raise AssertionError(f"{service} mounts nothing at {path}")


def test_the_file_has_the_shape_that_compose_reads() -> None:
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec", str(FILE)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("service", SERVICES)
def test_every_mounted_path_exists_and_named_volumes_are_declared(service: str) -> None:
    declared = yaml.safe_load(FILE.read_text())["volumes"]
    assert all(source.exists() for source in mounts(service).values())
    for volume in SERVICES[service]["volumes"]:
        assert volume.startswith((".", "${")) or volume.split(":")[0] in declared


def test_only_loopback_is_published_and_the_versions_are_fixed() -> None:
    for service in SERVICES.values():
        assert all(port.startswith("127.0.0.1:") for port in service["ports"])
        assert "build" in service or re.fullmatch(r"[\w/.-]+:v?\d+\.\d+\.\d+", service["image"])
    published = [port.split(":")[1] for service in SERVICES.values() for port in service["ports"]]
    assert len(set(published)) == len(published)


def test_the_server_is_given_a_configuration_that_it_takes() -> None:
    command = SERVICES["halftone"]["command"]
    assert load_config(seen_in("halftone", command[1])).variants
    assert (DEPLOYMENTS / SERVICES["halftone"]["build"]["context"] / "Dockerfile").is_file()


def test_prometheus_reads_these_rules_and_scrapes_the_server_by_its_name() -> None:
    (flag,) = [flag for flag in SERVICES["prometheus"]["command"] if flag.startswith("--config.file=")]
    config = seen_in("prometheus", flag.removeprefix("--config.file="))
    assert config == PROMETHEUS / "prometheus.yml"
    document = yaml.safe_load(config.read_text())
    assert all((config.parent / rules).is_file() for rules in document["rule_files"])
    (scraped,) = document["scrape_configs"]
    assert scraped["static_configs"] == [{"targets": ["halftone:8000"]}]


def test_grafana_finds_prometheus_and_its_dashboard() -> None:
    provisioning = seen_in("grafana", "/etc/grafana/provisioning")
    (source,) = yaml.safe_load((provisioning / "datasources/prometheus.yaml").read_text())["datasources"]
    assert source["url"] == "http://prometheus:9090"
    (provider,) = yaml.safe_load((provisioning / "dashboards/halftone.yaml").read_text())["providers"]
    assert list(seen_in("grafana", provider["options"]["path"]).glob("*.json"))
    home = SERVICES["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    assert seen_in("grafana", home).is_file()
