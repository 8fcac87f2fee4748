"""Which text is calibrated on: exactly what was asked for, the same every time, or an error that says where."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from serve.compression.calibration import Calibration, bundled
from serve.compression.recipe import Recipe
from serve.errors import CalibrationError
from serve.loading import load


@pytest.fixture
def stories(tmp_path: Path) -> Path:
    file = tmp_path / "stories.jsonl"
    file.write_text("".join(json.dumps({"text": f"story {n}", "id": n}) + "\n" for n in range(10)))
    return file


def test_the_first_records_are_taken(stories: Path) -> None:
    assert Calibration(stories, num_samples=3).texts() == ["story 0", "story 1", "story 2"]
    assert len(Calibration(stories).texts()) == 10


def test_a_seed_draws_the_same_records_every_time(stories: Path) -> None:
    drawn = Calibration(stories, num_samples=4, seed=7).texts()
    assert drawn == Calibration(stories, num_samples=4, seed=7).texts()
    assert drawn != Calibration(stories, num_samples=4, seed=8).texts()
    assert len(set(drawn)) == 4


def test_plain_text_is_cut_into_paragraphs(tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_text("One.\nStill one.\n\n \nTwo.\n\n\n")
    assert Calibration(file).texts() == ["One.\nStill one.", "Two."]


def test_samples_are_cut_at_the_limit_and_at_the_context(stories: Path) -> None:
    def tokenize(text: str) -> list[int]:
        return [ord(character) for character in text]

    assert [len(ids) for ids in Calibration(stories, num_samples=2, max_tokens=4).samples(tokenize, 100)] == [4, 4]
    assert [len(ids) for ids in Calibration(stories, num_samples=2).samples(tokenize, 5)] == [5, 5]


def test_the_fingerprint_follows_the_contents_not_the_name(stories: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy.jsonl"
    copy.write_bytes(stories.read_bytes())
    assert Calibration(stories).to_dict() == Calibration(copy).to_dict()
    copy.write_text('{"text": "other"}\n')
    assert Calibration(stories).to_dict() != Calibration(copy).to_dict()
    assert Calibration(stories).to_dict() != Calibration(stories, num_samples=5).to_dict()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"text": "a"}\n{"text": \n', "line 2: not JSON"),
        ('{"text": "a"}\n{"body": "b"}\n', "line 2: expected"),
        ('{"text": 5}\n', "line 1: expected"),
        ("\n\n", "no text"),
        ('{"text": "  "}\n', "no text"),
    ],
)
def test_a_file_that_cannot_be_used_is_refused_with_the_line(tmp_path: Path, content: str, message: str) -> None:
    file = tmp_path / "broken.jsonl"
    file.write_text(content)
    with pytest.raises(CalibrationError, match=message):
        Calibration(file).texts()


def test_missing_binary_and_senseless_requests_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match="no such"):
        Calibration(tmp_path / "absent.txt").texts()
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(CalibrationError, match="UTF-8"):
        Calibration(tmp_path / "binary.txt").texts()
    with pytest.raises(CalibrationError, match="num_samples"):
        Calibration(tmp_path / "binary.txt", num_samples=0)


def test_the_bundled_stories_are_enough_for_the_default() -> None:
    assert len(bundled().texts()) == 128


def test_an_override_that_looks_at_text_is_calibrated_and_fingerprinted(shared: Path) -> None:
    recipe = Recipe.parse({"stages": ["int8"], "overrides": {"*.0.*": "gptq4-g64"}})
    assert recipe.needs_calibration
    assert not Recipe.parse({"stages": ["int8"], "overrides": {"*.0.*": "nf4"}}).needs_calibration
    tiny, calib = str(shared / "models" / "TinyStories-656K"), shared / "data" / "tinystories" / "calib.jsonl"
    few, other = (load(tiny, recipe, device="cpu", calibration=Calibration(calib, count)) for count in (2, 3))
    assert few.report.calibration_tokens > 0
    assert few.fingerprint != other.fingerprint


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A dataset in the Hub's cache as a download leaves it, and no network."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    repository, commit = tmp_path / "hub" / "datasets--someone--stories", "0123456789" * 4
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    (repository / "snapshots" / commit).mkdir(parents=True)
    return repository / "snapshots" / commit


def test_a_dataset_of_the_hub_is_read_and_fingerprinted_by_its_contents(hub: Path, tmp_path: Path) -> None:
    (hub / "README.md").write_text("About stories.")
    (hub / "train.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    (tmp_path / "same.jsonl").write_bytes((hub / "train.jsonl").read_bytes())
    for spec in ("hub:someone/stories", "hub:someone/stories:train.jsonl", "hub:someone/stories:train.jsonl@main"):
        found = Calibration(Path(spec))
        assert found.texts() == ["one", "two"]
        assert found.to_dict() == Calibration(tmp_path / "same.jsonl").to_dict()


def test_what_the_hub_cannot_give_is_told_with_the_remedy(hub: Path) -> None:
    for number in range(8):
        (hub / f"part-{number}.txt").write_text("text")
    with pytest.raises(CalibrationError, match=r"hub:someone/stories:FILE of part-0.txt, .* and 2 more"):
        Calibration(Path("hub:someone/stories")).texts()
    for spec in ("hub:someone/other", "hub:someone/stories:absent.jsonl"):
        with pytest.raises(CalibrationError, match="offline, use a local file"):
            Calibration(Path(spec)).texts()
    with pytest.raises(CalibrationError, match="not of the form"):
        Calibration(Path("hub:")).texts()


def test_parquet_is_read_by_its_text_column(tmp_path: Path) -> None:
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(arrow.table({"text": ["one", None, "two"], "id": [1, 2, 3]}), tmp_path / "text.parquet")
    assert Calibration(tmp_path / "text.parquet").texts() == ["one", "two"]
    parquet.write_table(arrow.table({"body": ["one"]}), tmp_path / "other.parquet")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1")
    for name in ("other", "broken"):
        with pytest.raises(CalibrationError, match="column of text"):
            Calibration(tmp_path / f"{name}.parquet").texts()
