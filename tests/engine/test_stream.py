from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from serve.engine.stream import Detokenizer, StopStrings, TextStream
from serve.engine.vocabulary import Vocabulary
from serve.generation import SamplingParams
from tests.engine.conftest import byte_tokenizer

TOKENIZER = byte_tokenizer()
VOCABULARY = Vocabulary(TOKENIZER)
STORY = "Once upon a time, there was a 🐉 named Žofie — “hello”, she said. 你好\n\n"


def ids(text: str) -> list[int]:
    return list(TOKENIZER(text)["input_ids"])


def pieces(prompt: str, output: list[int], *, skip_special_tokens: bool = True) -> list[str]:
    stream = Detokenizer(VOCABULARY, ids(prompt), skip_special_tokens=skip_special_tokens)
    return [*[stream.push(token) for token in output], stream.flush()]


def test_no_piece_is_part_of_a_character() -> None:
    out = pieces("A ", ids(STORY))
    assert "".join(out) == STORY
    assert "\ufffd" not in "".join(out)
    assert [piece for piece in out if piece] == list(STORY)


@settings(max_examples=50)
@given(st.text(max_size=30), st.text(max_size=40))
def test_the_pieces_joined_are_what_was_said(prompt: str, text: str) -> None:
    assert "".join(pieces(prompt, ids(text))) == text


@given(st.lists(st.integers(0, 255), max_size=60))
def test_any_bytes_come_out_as_decoding_all_of_them_would(output: list[int]) -> None:
    joined = "".join(pieces("", output))
    whole = VOCABULARY.decode(output)
    assert joined.replace("\ufffd", "") == whole.replace("\ufffd", "")


def test_an_unfinished_character_is_shown_at_the_end() -> None:
    assert pieces("", ids("é")[:1]) == ["", "\ufffd"]


def test_bytes_that_never_become_text_are_not_held_forever() -> None:
    stream = Detokenizer(VOCABULARY, [], skip_special_tokens=True)
    shown = [stream.push(token) for token in ids("é")[:1] * 100]
    assert any(shown)


def test_a_character_that_the_prompt_began_is_finished_by_the_output() -> None:
    first, second = ids("é")
    stream = Detokenizer(VOCABULARY, [first], skip_special_tokens=True)
    assert stream.push(second) == "é"


def test_special_tokens_are_skipped_or_shown() -> None:
    output = [*ids("a"), 257, *ids("b")]
    assert "".join(pieces("", output)) == "ab"
    assert "".join(pieces("", output, skip_special_tokens=False)) == "a</s>b"


def through(stops: tuple[str, ...], text: list[str], *, include: bool = False) -> tuple[str, str | None]:
    finder = StopStrings(stops, include=include)
    out = ""
    for piece in text:
        match = finder.push(piece)
        out += match.text
        if match.stop is not None:
            return out, match.stop
    return out + finder.flush(), None


def test_a_stop_string_is_found_across_pieces() -> None:
    assert through(("END",), list("the ENd and the END of it")) == ("the ENd and the ", "END")


def test_a_stop_string_may_be_included() -> None:
    assert through(("END",), list("the END!"), include=True) == ("the END", "END")


def test_the_earliest_of_several_stop_strings_wins() -> None:
    assert through(("b", "ab"), ["xxaby"]) == ("xx", "ab")


@given(
    st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=3),
    st.lists(st.text("abc", max_size=3), max_size=20),
)
def test_streamed_stops_cut_where_searching_the_whole_text_would(stops: list[str], text: list[str]) -> None:
    whole = "".join(text)
    found = [whole.find(stop) for stop in stops if stop in whole]
    out, stop = through(tuple(stops), text)
    if stop is None:
        assert (out, found) == (whole, [])
    else:
        # A piece may complete a longer stop string that began earlier than one already seen: never the reverse.
        assert whole.startswith(out + stop)
        assert len(out) >= min(found)


@given(st.text("ab", min_size=1, max_size=5), st.lists(st.text("abc", max_size=3), max_size=20))
def test_text_that_goes_out_is_never_part_of_a_stop_string(stop: str, text: list[str]) -> None:
    finder = StopStrings((stop,), include=False)
    out = ""
    for piece in text:
        match = finder.push(piece)
        out += match.text
        if match.stop is not None:
            break
    assert stop not in out


def test_a_stop_string_before_min_tokens_goes_through() -> None:
    stream = TextStream(VOCABULARY, [], SamplingParams(stop=("a",)))
    assert stream.push(ids("a")[0], may_stop=False).text == "a"
    assert stream.push(ids("a")[0]).stop == "a"


@pytest.mark.parametrize("text", ["plain", "é", "🐉", " spaced"])
def test_the_bytes_of_tokens_joined_are_the_text(text: str) -> None:
    assert b"".join(VOCABULARY.bytes_of(token) for token in ids(text)).decode() == text


@pytest.mark.parametrize("folder", ["data/gpt2-tokenizer", "models/TinyStories-656K"])
def test_real_tokenizers_stream_what_they_decode(shared: Path, folder: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(shared / folder)
    vocabulary = Vocabulary(tokenizer)
    tokens = list(tokenizer(STORY * 2)["input_ids"])
    for split in (1, 7, len(tokens) // 2):
        stream = Detokenizer(vocabulary, tokens[:split], skip_special_tokens=True)
        out = "".join(stream.push(token) for token in tokens[split:]) + stream.flush()
        whole = tokenizer.decode(tokens, skip_special_tokens=True)
        prompt = tokenizer.decode(tokens[:split], skip_special_tokens=True)
        assert prompt.rstrip("\ufffd") + out == whole
    joined = b"".join(vocabulary.bytes_of(token) for token in tokens).decode()
    assert joined.strip() == vocabulary.decode(tokens, skip_special_tokens=False).strip()
