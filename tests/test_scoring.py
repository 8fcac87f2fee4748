"""Scoring keeps to its share of the time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import pytest

from serve.api.backend import Call
from serve.generation import GenerationRequest, SamplingParams
from serve.heartbeat import VariantState, View
from serve.journal import Journal
from serve.pairs import DriftSettings, Kept, Scores, Side
from serve.rollout import Split
from serve.scoring import Scorer

SCORES = Scores((0.1,), 1, 0, 0.0, None, 1, 0.0, 0.0)
READY = [replace(VariantState(name, name), state="ready", head="same") for name in ("bf16", "int8")]
SPLIT = Split("bf16", {"bf16": 50.0, "int8": 50.0})
VIEW = View(SPLIT, tuple(READY))


class Reader:
    """Takes half a second for every text."""

    def __init__(self) -> None:
        self.now_s = 0.0

    async def score(self, kept: Kept, side: Side) -> Scores:
        self.now_s += 0.5
        return SCORES


async def share_scored(settings: DriftSettings, requests: int, gap_s: float) -> float:
    reader = Reader()
    readers: Mapping[str, Reader] = {"bf16": reader}
    journal = Journal("m", "i")
    scorer = Scorer(settings, readers, journal, clock=lambda: reader.now_s)
    scored = 0
    for number in range(requests):
        request = GenerationRequest(f"r{number}", (1, 2), SamplingParams())
        trace = journal.open(Call("m", (request,)), READY[1], None, SPLIT)
        if sample := scorer.draw(request, READY[1], VIEW):
            await scorer.score(sample, Kept(None), trace)
            scored += 1
        reader.now_s += gap_s
    return scored / requests


@pytest.mark.parametrize(
    ("ratio", "gap_s", "least", "most"),
    [
        (None, 0.1, 1.0, 1.0),
        (0.05, 10.0, 1.0, 1.0),  # a request in ten seconds: each finds its half second
        (0.05, 0.1, 0.01, 0.03),  # ten in a second: one in a hundred, and the first look
    ],
)
async def test_a_busy_server_is_scored_for_a_share_of_the_time_and_an_idle_one_whole(
    ratio: float | None, gap_s: float, least: float, most: float
) -> None:
    settings = DriftSettings("bf16", 1.0, ratio)
    assert least <= await share_scored(settings, 1000, gap_s) <= most
