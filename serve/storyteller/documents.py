"""Turns stories and chats into token sequences that say what to learn from each token, and packs them into
full windows.

A story is tokenized as the teacher would, so teacher and student predict the same token at the same place,
whatever stands before the story in the student's window: a chat's request, or other stories.
"""

import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from .dialogue import Message, compose_dialogue, opening
from .teacher import BOS_ID, EOS_ID

__all__ = ["REQUESTS_LATER", "STORIES_FIRST", "Document", "DocumentMaker", "Mix", "Window", "pack"]

IGNORED = -100
_WORD_END = re.compile(r"(?<=[.!?\"]) |(?<=\w)\b")


@dataclass(frozen=True)
class Document:
    """`ids` from BOS to EOS. `learnt[i]`: predicting ids[i] counts. Where `teacher_share` is over 0 the ids
    are one story, and the teacher's judgement of it counts that much, the text itself the rest."""

    ids: list[int]
    learnt: list[bool]
    teacher_share: float


@dataclass(frozen=True)
class Window:
    """One training row: `inputs` and `targets` `[length]` (int64, IGNORED where nothing is learnt) and the
    parts of it that the teacher judges: (place of BOS, ids from BOS on as the teacher reads them, share)."""

    inputs: Tensor
    targets: Tensor
    judged: list[tuple[int, list[int], float]]


@dataclass(frozen=True)
class Mix:
    """Which share of the documents becomes what; the rest is plain text."""

    chat: float
    opening: float  # a chat that breaks off after the first sentences, where heeding the request pays
    cut: float  # plain text, tokenized in two pieces as a prompt and its continuation are


STORIES_FIRST = Mix(chat=0.35, opening=0.0, cut=0.15)
REQUESTS_LATER = Mix(chat=0.15, opening=0.6, cut=0.07)


@dataclass(frozen=True)
class DocumentMaker:
    """Decides what becomes of a story."""

    tokenizer: PreTrainedTokenizerFast
    mix: Mix

    def make(self, stories: Sequence[str], teacher_share: float, generator: random.Random) -> Document:
        """From one story, or for a chat of more turns up to all of them."""
        kind = generator.random()
        if kind < self.mix.chat:
            turns = generator.choice((1, 1, 1, 1, 2, 3))
            return self._chat(compose_dialogue(stories[:turns], generator))
        if kind < self.mix.chat + self.mix.opening:
            return self._opening(stories[0], generator)
        if kind < self.mix.chat + self.mix.opening + self.mix.cut:
            return self._cut(stories[0], generator)
        return self._plain(self._encode(stories[0]), teacher_share)

    def _chat(self, messages: Sequence[Message]) -> Document:
        ids, learnt = [BOS_ID], [True]
        for message in messages:
            content = self._encode(message["content"])
            answers = message["role"] == "assistant"
            ids += [self._role(message["role"]), *content, *([EOS_ID] if answers else [])]
            learnt += [False] + [answers] * (len(ids) - len(learnt) - 1)
        return Document(ids, learnt, teacher_share=0.0)

    def _opening(self, story: str, generator: random.Random) -> Document:
        *request, answer = compose_dialogue([story], generator)
        chat = self._chat([*request, {**answer, "content": opening(story)}])
        return Document(chat.ids[:-2], chat.learnt[:-2], teacher_share=0.0)  # without EOS, nor the full stop before it

    def _cut(self, story: str, generator: random.Random) -> Document:
        """Prompts end anywhere, mostly after a word, also inside what the tokenizer would have merged."""
        ends = [match.start() for match in _WORD_END.finditer(story, 1, 200)]
        place = (
            generator.choice(ends) if generator.random() < 0.8 and ends else generator.randint(1, min(100, len(story)))
        )
        return self._plain(self._encode(story[:place]) + self._encode(story[place:]), teacher_share=0.0)

    def _plain(self, story_ids: list[int], teacher_share: float) -> Document:
        ids = [BOS_ID, *story_ids, EOS_ID]
        return Document(ids, [True] * len(ids), teacher_share=teacher_share)

    def _encode(self, text: str) -> list[int]:
        return list(self.tokenizer.encode(text, add_special_tokens=False))

    def _role(self, role: str) -> int:
        return self.tokenizer.get_vocab()[f"<|{role}|>"]


def pack(documents: Iterator[Document], length: int, teacher_context: int) -> Iterator[Window]:
    """Full windows of `length` predictions. A document that does not fit ends with its window: none starts
    amid a story. `teacher_context` is in tokens; what lies behind it is not judged."""
    ids: list[int] = []
    learnt: list[bool] = []
    judged: list[tuple[int, list[int], float]] = []
    for document in documents:
        if document.teacher_share and len(ids) < length:
            read = document.ids[:-1][: min(teacher_context, length - len(ids))]
            judged.append((len(ids), read, document.teacher_share))
        # Where a document broke off, nothing ended: that another one begins is not learnt.
        learnt += [not ids or ids[-1] == EOS_ID, *document.learnt[1:]]
        ids += document.ids
        if len(ids) > length:
            targets = torch.tensor(
                [i if kept else IGNORED for i, kept in zip(ids, learnt, strict=True)][1 : length + 1]
            )
            yield Window(torch.tensor(ids[:length]), targets, judged)
            ids, learnt, judged = [], [], []
