"""What a token teaches: distillation (Hinton et al., arXiv:1503.02531) beside the text itself.

A story that the teacher judges costs, at each token, a mixture of the divergence KL(teacher || student) over the
whole vocabulary and the negative log-likelihood of the token that really follows. Everything else costs the latter.
"""

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import LlamaForCausalLM

from .documents import IGNORED, Window
from .teacher import EOS_ID, TEACHER_EOS_ID

__all__ = ["judge", "window_loss"]


def window_loss(logits: Tensor, targets: Tensor, windows: list[Window], teacher: LlamaForCausalLM) -> Tensor:
    """Mean nats per learnt token; logits `[windows, length, vocabulary]` in float32, targets `[windows, length]`."""
    log_probabilities = logits.log_softmax(-1)
    text = F.nll_loss(log_probabilities.flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="none")
    text = text.view_as(targets)
    total = text.sum()
    parts = [(row, *part) for row, window in enumerate(windows) for part in window.judged]
    judgements = judge(teacher, [ids for _, _, ids, _ in parts])
    for (row, start, ids, share), judgement in zip(parts, judgements, strict=True):
        place = slice(start, start + len(ids))
        student = log_probabilities[row, place, : judgement.shape[1]]
        divergence = (judgement.exp() * (judgement - student)).sum()
        total = total + share * (divergence - text[row, place].sum())
    return total / (targets != IGNORED).sum()


@torch.no_grad()
def judge(teacher: LlamaForCausalLM, stories: list[list[int]]) -> list[Tensor]:
    """The teacher's log-probabilities after each id, `[tokens, teacher vocabulary]`, with its story end put at EOS."""
    if not stories:
        return []
    batch = torch.nn.utils.rnn.pad_sequence([torch.tensor(ids) for ids in stories], batch_first=True)
    with torch.autocast("cpu", torch.bfloat16):
        logits = teacher(input_ids=batch).logits.float()  # causal: what is padded on the right changes nothing before
    ids = torch.arange(logits.shape[-1])
    ids[[EOS_ID, TEACHER_EOS_ID]] = ids[[TEACHER_EOS_ID, EOS_ID]]
    return [row[: len(story), ids].log_softmax(-1) for row, story in zip(logits, stories, strict=True)]
