from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from tests.engine.conftest import Desk, tiny_llama

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def test_greedy_on_cuda_equals_generate_there(desks: Callable[..., Desk]) -> None:
    model = tiny_llama().cuda()
    prompts = [[3, 1, 4, 1, 5, 9, 2, 6], [27, 18, 28], list(range(40, 70))]
    model.set_attn_implementation("eager")
    expected = [
        model.generate(torch.tensor([prompt], device="cuda"), max_new_tokens=24, do_sample=False)[0, len(prompt) :]
        for prompt in prompts
    ]
    desk = desks(model, block_size=4, max_num_batched_tokens=64)
    answers = desk.wait(*[desk.submit(prompt, max_tokens=24) for prompt in prompts])
    assert [answer.tokens() for answer in answers] == [tokens.tolist() for tokens in expected]


def test_a_seeded_request_on_cuda_does_not_see_its_neighbours(desks: Callable[..., Desk]) -> None:
    desk = desks(tiny_llama().cuda())
    asked = {"temperature": 1.0, "top_p": 0.9, "seed": 7, "max_tokens": 30, "ignore_eos": True}
    alone = desk.ask([1, 2, 3], **asked).tokens()
    others = [desk.submit([5, index], temperature=1.0, seed=index, max_tokens=30) for index in range(15)]
    assert desk.ask([1, 2, 3], **asked).tokens() == alone
    desk.wait(*others)
