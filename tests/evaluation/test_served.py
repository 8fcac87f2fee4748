"""What is evaluated is what is served: the same step, the same logits."""

from __future__ import annotations

import pytest
import torch

from serve.compression.recipe import Recipe
from serve.engine.native import is_covered
from serve.evaluation.served import served_logits
from serve.loading import LoadedModel, load
from serve.quality import model_logits
from tests.engine.conftest import Desk
from tests.engine.test_witness import Seen, watch

IDS = list(range(300, 400))


def storyteller(recipe: str) -> LoadedModel:
    return load("builtin:storyteller", Recipe.parse(recipe), artifacts=None)


@pytest.mark.parametrize("recipe", ["bf16", "int8"])
def test_logits_are_those_of_the_step_that_serves(recipe: str) -> None:
    loaded, served = storyteller(recipe), storyteller(recipe)
    if not is_covered(loaded.model):
        pytest.skip("this machine has no kernels: the plain pass serves")
    desk = Desk(served.model, served.tokenizer)
    try:
        seen = Seen("prompt_logits")
        desk.wait(watch(desk, "scored", IDS, seen, max_tokens=0))
        assert desk.engine.path == "native path"
        source = served_logits(loaded)
        for _ in range(2):  # nothing of a record is left for the next
            assert torch.equal(source(IDS), seen.all())
        assert len(source(IDS[:40])) == 39
    finally:
        desk.engine.close()


def test_a_model_that_is_not_compiled_is_asked_plainly() -> None:
    loaded = storyteller("fp32")
    assert not is_covered(loaded.model)
    assert torch.equal(served_logits(loaded)(IDS), model_logits(loaded.model)(IDS))
