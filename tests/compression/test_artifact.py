"""The artifact store: a second load is a hit, a damaged artifact is never served, and nothing is lost to a kill."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from serve.compression.artifact import Artifact, Store
from serve.compression.recipe import Recipe
from serve.errors import ArtifactError
from serve.loading import LoadedModel, load

RECIPES = ["bf16", "int8", "int8-weight", "nf4", "nf4-dq", "int8+head8", "fp32+int8"]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def tiny(shared: Path) -> str:
    return str(shared / "models" / "TinyStories-656K")


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return tmp_path / "store"


def logits(loaded: LoadedModel) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = loaded.model(torch.arange(3, 60)[None]).logits
        return found


def only_part(store: Path, fingerprint: str) -> Path:
    return store / fingerprint / "model.layers.0.safetensors"


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_second_load_is_a_hit_with_the_same_answers(tiny: str, store: Path, recipe: str) -> None:
    first = load(tiny, Recipe.parse(recipe), artifacts=store)
    second = load(tiny, Recipe.parse(recipe), artifacts=store)
    assert (first.report.artifact_hit, second.report.artifact_hit) == (False, True)
    assert second.fingerprint == first.fingerprint
    assert torch.equal(logits(second), logits(first))
    assert second.report.total_bytes == first.report.total_bytes
    assert second.report.mapped_bytes > 0
    if "+head8" not in recipe:
        assert second.model.lm_head.weight is second.model.model.embed_tokens.weight


def test_a_hit_does_not_open_the_source_weights(tiny: str, store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load(tiny, Recipe.parse("int8"), artifacts=store)
    monkeypatch.setattr("serve.compression.checkpoints.safe_open", None)
    assert load(tiny, Recipe.parse("int8"), artifacts=store).report.artifact_hit


def test_a_model_that_is_only_read_is_not_copied(tiny: str, store: Path) -> None:
    assert not load(tiny, Recipe.parse("fp32"), artifacts=store).report.artifact_hit
    assert not store.exists()


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:1000])


@pytest.mark.parametrize("damage", [flip_a_byte, truncate, Path.unlink])
def test_a_damaged_part_is_noticed_and_made_anew(tiny: str, store: Path, damage) -> None:  # type: ignore[no-untyped-def]
    first = load(tiny, Recipe.parse("int8"), artifacts=store)
    damage(only_part(store, first.fingerprint))
    with pytest.raises(ArtifactError, match=r"model\.layers\.0"):
        Store(store).open(first.fingerprint).verify()
    again = load(tiny, Recipe.parse("int8"), artifacts=store)
    assert not again.report.artifact_hit
    assert torch.equal(logits(again), logits(first))
    assert load(tiny, Recipe.parse("int8"), artifacts=store).report.artifact_hit


def test_a_foreign_artifact_under_our_name_is_not_served(tiny: str, store: Path) -> None:
    int8 = load(tiny, Recipe.parse("int8"), artifacts=store)
    nf4 = load(tiny, Recipe.parse("nf4"), artifacts=store)
    Store(store).discard(int8.fingerprint)
    (store / nf4.fingerprint).rename(store / int8.fingerprint)
    with pytest.raises(ArtifactError, match="holds the artifact"):
        Store(store).open(int8.fingerprint)
    assert not load(tiny, Recipe.parse("int8"), artifacts=store).report.artifact_hit


@pytest.mark.parametrize("content", ["", "{}", '{"format_version": 99, "fingerprint": "x", "parts": {}}', "[]"])
def test_an_unreadable_manifest_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(ArtifactError):
        Artifact.open(tmp_path)


def test_a_manifest_cannot_lead_out_of_its_folder(tmp_path: Path) -> None:
    part = {"file": "../elsewhere.safetensors", "sha256": "", "bytes": 0}
    manifest = {"format_version": 1, "fingerprint": "x", "parts": {"rest": part}}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ArtifactError, match="leads out"):
        Artifact.open(tmp_path)


def test_an_interrupted_attempt_goes_on_from_its_finished_parts(tiny: str, store: Path) -> None:
    done = load(tiny, Recipe.parse("int8"), artifacts=store)
    whole, partial = store / done.fingerprint, store / f".partial-{done.fingerprint}"
    whole.rename(partial)  # as if killed before the last rename, and while the last block was being written
    parts = json.loads((partial / "manifest.json").read_text())["parts"]
    (partial / "manifest.json").unlink()
    for name, entry in parts.items():
        if name != "model.layers.1":
            (partial / f"{entry['file']}.json").write_text(json.dumps(entry))
    truncate(partial / "model.layers.1.safetensors")
    before = (partial / "model.layers.0.safetensors").stat().st_mtime_ns
    again = load(tiny, Recipe.parse("int8"), artifacts=store)
    assert torch.equal(logits(again), logits(done))
    assert (whole / "model.layers.0.safetensors").stat().st_mtime_ns == before
    assert load(tiny, Recipe.parse("int8"), artifacts=store).report.artifact_hit


RUN = """
import sys
from pathlib import Path
from serve.compression.recipe import Recipe
from serve.loading import load
print(load(sys.argv[1], Recipe.parse("int8"), artifacts=Path(sys.argv[2])).report.artifact_hit)
"""
PRUNE = """
import sys
from pathlib import Path
from serve.compression.artifact import Store
print(Store(Path(sys.argv[1])).prune())
"""


def start(tiny: str, store: Path) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", RUN, tiny, str(store)], stdout=subprocess.PIPE, text=True)


@pytest.mark.slow
def test_two_processes_that_ask_at_once_compress_once(tiny: str, store: Path) -> None:
    both = [start(tiny, store) for _ in range(2)]
    answers = sorted(process.communicate(timeout=200)[0].strip() for process in both)
    assert answers == ["False", "True"]


@pytest.mark.slow
def test_a_killed_process_leaves_nothing_that_is_served(tiny: str, store: Path) -> None:
    for delay_s in (0.0, 0.02, 0.1):
        process = start(tiny, store)
        while not list(store.glob(".partial-*")) and process.poll() is None:
            time.sleep(0.005)
        time.sleep(delay_s)
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
        for artifact in Store(store).artifacts():
            artifact.verify()
    expected = load(tiny, Recipe.parse("int8"))
    assert torch.equal(logits(load(tiny, Recipe.parse("int8"), artifacts=store)), logits(expected))


def test_artifacts_are_listed_verified_and_pruned(tiny: str, store: Path) -> None:
    kept = load(tiny, Recipe.parse("int8"), artifacts=store)
    load(tiny, Recipe.parse("nf4"), artifacts=store)
    found = Store(store).artifacts()
    assert {artifact.manifest["recipe_name"] for artifact in found} == {"int8", "nf4"}
    assert all(artifact.size_bytes > 0 for artifact in found)
    for artifact in found:
        artifact.verify()
    Store(store).prune(keep=frozenset({kept.fingerprint}))
    assert [artifact.fingerprint for artifact in Store(store).artifacts()] == [kept.fingerprint]


def test_an_artifact_that_is_being_made_is_not_pruned(store: Path) -> None:
    with Store(store).locked("abc"):
        Store(store).draft("abc")
        arguments = [sys.executable, "-c", PRUNE, str(store)]
        done = subprocess.run(arguments, check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "[]"
    assert Store(store).prune() == [".partial-abc"]
