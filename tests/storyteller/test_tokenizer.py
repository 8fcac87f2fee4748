from pathlib import Path

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers.decoders import DecodeStream
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from serve.storyteller import CALIBRATION, PATH
from serve.storyteller.evaluate import read_stories
from serve.storyteller.tokenizer import ROLES, VOCABULARY_SIZE

any_text = st.text(st.characters(exclude_categories=["Cs"]))  # everything that UTF-8 can say


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(PATH)


@given(text=any_text)
@settings(deadline=None, max_examples=500)
def test_any_text_comes_back_exactly(tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert tokenizer.decode(ids) == text


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "  two spaces",
        "\n\ntabs\t\n ",
        "\0",
        "a\0b",
        "▁_▁",
        "<0x41>",
        "don 't , said .",
        "👩‍👩‍👧 🎈",
        "汉字",
        "ÿ“é”",
        "Ġ",
    ],
)
def test_awkward_text_comes_back_exactly(tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    ids = tokenizer(text)["input_ids"]
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


@given(text=any_text)
@settings(deadline=None, max_examples=200)
def test_text_streams_without_loss(tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    """Token by token, as a server sends it: partial characters wait until their last byte.

    tokenizers' stream takes a U+FFFD that was really written for a partial character, and waits for ever.
    """
    assume("\ufffd" not in text)
    stream, backend = DecodeStream(skip_special_tokens=False), tokenizer.backend_tokenizer
    pieces = [stream.step(backend, token) for token in tokenizer.encode(text, add_special_tokens=False)]
    assert "".join(piece for piece in pieces if piece) == text


def test_every_id_has_a_meaning(tokenizer: PreTrainedTokenizerBase) -> None:
    vocabulary = tokenizer.get_vocab()
    assert sorted(vocabulary.values()) == list(range(VOCABULARY_SIZE))
    assert len(tokenizer) == VOCABULARY_SIZE


def test_stories_are_short_in_tokens(tokenizer: PreTrainedTokenizerBase) -> None:
    story = read_stories(CALIBRATION)[0]
    assert len(tokenizer.encode(story)) < len(story) / 3


def test_roles_are_single_tokens(tokenizer: PreTrainedTokenizerBase) -> None:
    assert all(len(tokenizer.encode(role, add_special_tokens=False)) == 1 for role in ROLES)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 0)


def test_ids_are_the_teachers(tokenizer: PreTrainedTokenizerBase, shared: Path) -> None:
    teacher = AutoTokenizer.from_pretrained(shared / "models/TinyStories-656K")
    space = teacher.convert_tokens_to_ids("▁")
    for story in read_stories(shared / "data/tinystories/calib.jsonl"):
        bos, leading, *ids = teacher.encode(story)
        assert (leading, [bos, *ids]) == (space, tokenizer.encode(story))
