import random
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from serve.storyteller import CALIBRATION, PATH
from serve.storyteller.documents import IGNORED, Document, DocumentMaker, Mix, pack
from serve.storyteller.evaluate import read_stories
from serve.storyteller.teacher import BOS_ID, EOS_ID


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(PATH)


@given(seed=st.integers(0, 10_000), chat_ratio=st.sampled_from([0.0, 1.0]), cut_ratio=st.sampled_from([0.0, 1.0]))
@settings(deadline=None, max_examples=50)
def test_documents_spell_their_story(
    tokenizer: PreTrainedTokenizerFast, seed: int, chat_ratio: float, cut_ratio: float
) -> None:
    stories = read_stories(CALIBRATION)[:1]
    maker = DocumentMaker(tokenizer, Mix(chat=chat_ratio, opening=0.0, cut=cut_ratio))
    document = maker.make(stories, 0.5, random.Random(seed))
    assert (document.ids[0], document.ids[-1], len(document.learnt)) == (BOS_ID, EOS_ID, len(document.ids))
    learnt = [token for token, counts in zip(document.ids, document.learnt, strict=True) if counts]
    assert tokenizer.decode(learnt, skip_special_tokens=True) == stories[0]
    assert document.teacher_share == (0.0 if chat_ratio or cut_ratio else 0.5)


def test_openings_break_off_and_do_not_end(tokenizer: PreTrainedTokenizerFast) -> None:
    story = read_stories(CALIBRATION)[0]
    maker = DocumentMaker(tokenizer, Mix(chat=0.0, opening=1.0, cut=0.0))
    document = maker.make([story], 0.5, random.Random(0))
    assert EOS_ID not in document.ids
    learnt = [token for token, counts in zip(document.ids, document.learnt, strict=True) if counts]
    assert story.startswith(tokenizer.decode(learnt, skip_special_tokens=True))
    assert 10 < len(learnt) < 80
    (window,) = pack(iter([document, document]), len(document.ids), teacher_context=8)
    assert window.targets[-1] == IGNORED  # that another document begins is nothing to learn


def stories_of(lengths: list[int]) -> Iterator[Document]:
    for index, length in enumerate(lengths):
        ids = [BOS_ID, *range(10 + index, 10 + index + length), EOS_ID]
        yield Document(ids, [True] * len(ids), teacher_share=0.5)


@given(lengths=st.lists(st.integers(0, 40), max_size=20))
def test_windows_are_full_and_the_teacher_reads_what_stands_in_them(lengths: list[int]) -> None:
    for window in pack(stories_of(lengths), 32, teacher_context=16):
        assert window.inputs.shape == window.targets.shape == (32,)
        assert window.inputs[0] == BOS_ID
        assert window.inputs[1:].tolist() == window.targets[:-1].tolist()
        for start, ids, _ in window.judged:
            assert ids == window.inputs[start : start + len(ids)].tolist()
            assert 1 <= len(ids) <= 16


def test_what_is_not_learnt_is_ignored() -> None:
    document = Document([BOS_ID, 5, 6, EOS_ID], [True, False, True, True], teacher_share=0.0)
    (window,) = pack(iter([document]), 3, teacher_context=8)
    assert window.targets.tolist() == [IGNORED, 6, EOS_ID]
