import pytest
import torch
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from serve.storyteller.documents import IGNORED, Window
from serve.storyteller.objective import judge, window_loss
from serve.storyteller.teacher import EOS_ID, TEACHER_EOS_ID

IDS = [1, 20, 30, 40]
TARGETS = torch.tensor([[IGNORED, 20, 30, 40, EOS_ID, IGNORED]])


@pytest.fixture(scope="module")
def teacher() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    return LlamaForCausalLM(config).eval()


def window(share: float) -> Window:
    return Window(torch.tensor([9, *IDS, EOS_ID]), TARGETS[0], [(1, IDS, share)] if share else [])


def test_without_a_teacher_the_loss_is_cross_entropy(teacher: LlamaForCausalLM) -> None:
    logits = torch.randn(1, 6, 300)
    loss = window_loss(logits, TARGETS, [window(0.0)], teacher)
    torch.testing.assert_close(loss, F.cross_entropy(logits[0], TARGETS[0], ignore_index=IGNORED))


def test_a_student_that_agrees_with_its_teacher_has_no_loss(teacher: LlamaForCausalLM) -> None:
    logits = torch.full((1, 6, 300), -1e4)
    logits[0, 1:5, :256] = judge(teacher, [IDS])[0]
    loss = window_loss(logits, TARGETS, [window(1.0)], teacher)
    assert loss.abs() < 1e-4


def test_shares_mix_linearly(teacher: LlamaForCausalLM) -> None:
    logits = torch.randn(1, 6, 300)
    text, half, whole = (window_loss(logits, TARGETS, [window(share)], teacher) for share in (0.0, 0.5, 1.0))
    torch.testing.assert_close(half, (text + whole) / 2)


def test_the_teachers_spelled_out_end_counts_as_the_end(teacher: LlamaForCausalLM) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        logits = teacher(torch.tensor([IDS])).logits.float().log_softmax(-1)[0]
    (judgement,) = judge(teacher, [IDS])
    torch.testing.assert_close(judgement[:, EOS_ID], logits[:, TEACHER_EOS_ID])
    torch.testing.assert_close(judgement[:, TEACHER_EOS_ID], logits[:, EOS_ID])
