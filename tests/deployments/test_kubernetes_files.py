"""The Kubernetes files run the image as it is built, and the same application as everywhere else."""

from __future__ import annotations

import re
from importlib.metadata import version
from typing import Any

import yaml

from serve.api.auth import PUBLIC_PATHS
from serve.config import load_config, parse_config
from tests.deployments.queries import DEPLOYMENTS

LOCAL = load_config(DEPLOYMENTS / "local.yaml")
DOCKERFILE = (DEPLOYMENTS.parent / "Dockerfile").read_text()


def documents(name: str) -> dict[str, Any]:
    """By kind."""
    return {each["kind"]: each for each in yaml.safe_load_all((DEPLOYMENTS / "kubernetes" / name).read_text())}


def test_the_pod_serves_what_runs_locally_and_the_service_finds_it() -> None:
    found = documents("halftone.yaml")
    pod = found["Deployment"]["spec"]["template"]
    (container,) = pod["spec"]["containers"]
    assert parse_config(yaml.safe_load(found["ConfigMap"]["data"]["halftone.yaml"])) == LOCAL
    assert found["Service"]["spec"]["selector"].items() <= pod["metadata"]["labels"].items()
    assert container["args"][1] == "/etc/halftone/halftone.yaml"
    assert {volume["name"] for volume in pod["spec"]["volumes"]} == {m["name"] for m in container["volumeMounts"]}


def test_probes_ask_what_needs_no_key() -> None:
    (container,) = documents("halftone.yaml")["Deployment"]["spec"]["template"]["spec"]["containers"]
    asked = {container[probe]["httpGet"]["path"] for probe in ("startupProbe", "readinessProbe", "livenessProbe")}
    assert asked <= PUBLIC_PATHS


def test_the_ray_service_deploys_the_application_of_serve_yaml_with_the_locked_ray() -> None:
    service = documents("rayservice.yaml")["RayService"]["spec"]
    deployed = yaml.safe_load(service["serveConfigV2"])
    assert deployed["applications"] == yaml.safe_load((DEPLOYMENTS / "serve.yaml").read_text())["applications"]
    assert service["rayClusterConfig"]["rayVersion"] == version("ray")


def test_containers_run_as_the_images_user_and_find_its_programs() -> None:
    (user,) = re.findall(r"--uid (\d+)", DOCKERFILE)
    cluster = documents("rayservice.yaml")["RayService"]["spec"]["rayClusterConfig"]
    head = cluster["headGroupSpec"]["template"]["spec"]
    alone = documents("halftone.yaml")["Deployment"]["spec"]["template"]["spec"]
    for pod in (head, alone, *(group["template"]["spec"] for group in cluster["workerGroupSpecs"])):
        assert pod["securityContext"]["runAsUser"] == int(user)
    (path,) = [entry["value"] for entry in head["containers"][0]["env"] if entry["name"] == "PATH"]
    assert path.startswith("/halftone/.venv/bin:")
    assert "WORKDIR /halftone\n" in DOCKERFILE
    assert " wget " in DOCKERFILE  # KubeRay's probes
