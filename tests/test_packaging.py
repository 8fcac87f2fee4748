"""The image, the Makefile, the lock and the package metadata say the same thing."""

from __future__ import annotations

import re
import subprocess
import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).resolve().parent.parent


def locked_versions() -> dict[str, Version]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pairs = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {_normal(name): Version(version) for name, version in pairs}


def declared_requirements() -> list[Requirement]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = [*project["dependencies"], *(r for extra in project["optional-dependencies"].values() for r in extra)]
    return [Requirement(line) for line in declared]


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_every_declared_dependency_is_locked_at_a_version_that_it_allows() -> None:
    locked = locked_versions()
    for requirement in declared_requirements():
        if requirement.name != "halftone":
            assert locked[_normal(requirement.name)] in requirement.specifier, requirement


def test_torch_is_locked_without_a_build_tag() -> None:
    assert str(locked_versions()["torch"]) == "2.13.0"


def test_every_make_target_that_the_image_runs_exists() -> None:
    targets = re.findall(r"RUN make ([\w-]+)", (ROOT / "Dockerfile").read_text())
    assert targets
    for target in targets:
        subprocess.run(["make", "--dry-run", target], cwd=ROOT, check=True, capture_output=True)


def test_the_image_does_not_run_as_root_and_checks_its_health() -> None:
    dockerfile = (ROOT / "Dockerfile").read_text()
    assert re.search(r"^USER halftone$", dockerfile, re.MULTILINE)
    assert "HEALTHCHECK" in dockerfile


def test_the_image_brings_the_kernels_of_every_cpu_and_leaves_the_compiler_behind() -> None:
    *_, build, image = re.split(r"^FROM ", (ROOT / "Dockerfile").read_text(), flags=re.MULTILINE)
    assert "g++" in build
    assert "RUN make kernels" in build
    assert "g++" not in image
    assert "/home/halftone/.cache/halftone" in image


def test_both_readmes_show_the_same_commands_configuration_and_figures() -> None:
    english, chinese = ((ROOT / name).read_text() for name in ("README.md", "README_CN.md"))

    def shape(text: str) -> list[str]:
        code = re.findall(r"^    \S[^\n]*$|^```.*?^```$", text, re.MULTILINE | re.DOTALL)
        without_comments = [re.sub(r"\s+#.*$", "", block, flags=re.MULTILINE) for block in code]
        rows = re.findall(r"^\|.*\|$", text, re.MULTILINE)
        figures = [figure for row in rows for figure in re.findall(r"\d+(?:\.\d+)?", row)]
        return [*without_comments, *figures]

    assert shape(english) == shape(chinese)
    assert english.count("\n## ") == chinese.count("\n## ")
