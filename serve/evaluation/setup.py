"""What is compared on what: everything that all rows of one evaluation share."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from serve.compression.calibration import Calibration
from serve.compression.recipe import Recipe

__all__ = ["STORIES", "Setup"]

STORIES = Path(__file__).parent / "stories.jsonl"
"""48 short English stories that no calibration text holds, sampled from TinyStories-656K (`serve.storyteller.teacher`,
seed 3, temperature 1): the text where none is named. Fit for models of such stories; name a text for any other."""


@dataclass(frozen=True)
class Setup:
    """`reference_source` None means `source`; another one must share its tokenizer (a distilled model's teacher).

    `limit` takes the first records of `text` only. `fresh` compresses anew instead of reading the artifact store.
    """

    source: str
    reference: Recipe
    text: Path = STORIES
    limit: int | None = None
    reference_source: str | None = None
    device: str = "auto"
    calibration: Calibration | None = None
    fresh: bool = False
    threads: int | None = None
