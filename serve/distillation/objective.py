"""What a token teaches: distillation (Hinton et al., arXiv 1503.02531) beside the text itself.

A teacher's distribution says more than the token that happened to follow: which others could have. Softened by a
temperature T it also tells the unlikely ones apart. The student is pulled towards it, and towards the text:

    loss = soft * T^2 * KL(softmax(teacher / T) || softmax(student / T)) + hard * -log softmax(student)[next token]

T^2 keeps the two gradients in proportion, for the softened one shrinks with 1 / T^2.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["IGNORED", "distillation_loss"]

IGNORED = -100
"""The target of a place where no token follows."""


def distillation_loss(
    student: Tensor, teacher: Tensor, targets: Tensor, *, temperature: float, soft_weight: float, hard_weight: float
) -> Tensor:
    """Summed nats over the tokens, a scalar. Logits `[tokens, vocabulary]` in float32, `targets [tokens]` int64.

    Places without a target learn from the teacher alone.
    """
    total = torch.zeros((), dtype=student.dtype, device=student.device)
    if soft_weight:
        soft = F.kl_div(
            (student / temperature).log_softmax(-1), (teacher / temperature).log_softmax(-1),
            reduction="sum", log_target=True,
        )  # fmt: skip
        total = total + soft_weight * temperature**2 * soft
    if hard_weight:
        total = total + hard_weight * F.cross_entropy(student, targets, ignore_index=IGNORED, reduction="sum")
    return total
