"""The loop in which a student learns from its teacher, and the checkpoints that let it go on after an interruption.

The student starts dense in float32 and stays in evaluation mode: dropout would only add noise to what the teacher
says. Where it was pruned, its zeros stay zeros. Nothing is random but the order of the text, which follows from the
seed and the step, so a run that goes on from its last checkpoint ends with the same weights as one never stopped.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from serve.compression.compress import Progress, silent
from serve.distillation.objective import distillation_loss
from serve.distillation.settings import Settings
from serve.distillation.windows import Batch, Windows
from serve.errors import CompressionError

__all__ = ["CHECKPOINT_STEPS", "train", "zeros_of"]

CHECKPOINT_STEPS = 25
_LOGITS_AT_ONCE = 1 << 25  # of one pass; a batch of a large vocabulary takes several


def zeros_of(student: nn.Module, projections: Iterable[str]) -> dict[str, Tensor]:
    """Which weights of the named layers are there, by parameter: bool, False where a pruner removed one."""
    return {f"{name}.weight": student.get_parameter(f"{name}.weight").detach() != 0 for name in projections}


def train(
    student: Any,
    teacher: Any,
    text: Windows,
    settings: Settings,
    *,
    kept: Mapping[str, Tensor] | None = None,
    checkpoint: Path | None = None,
    progress: Progress = silent,
) -> None:
    """Change `student` in place. Raise `CompressionError` if the loss is lost to infinity.

    `kept` has a mask for each pruned parameter. `checkpoint` is written every few steps and read first, if it is there.
    """
    lesson = _Lesson(student, teacher, settings, dict(kept or {}))
    student.requires_grad_(True)
    first = lesson.resume(checkpoint) if checkpoint is not None else 0
    for step in range(first, settings.steps):
        progress("distil", step, settings.steps)
        lesson.learn(text, step)
        if checkpoint is not None and (step + 1) % CHECKPOINT_STEPS == 0:
            lesson.save(checkpoint, step + 1)
    student.requires_grad_(False)
    progress("distil", settings.steps, settings.steps)


@dataclass
class _Lesson:
    student: Any
    teacher: Any
    settings: Settings
    kept: dict[str, Tensor]

    def __post_init__(self) -> None:
        config = self.student.config.get_text_config(decoder=True)
        self.hidden_size, self.vocabulary = int(config.hidden_size), int(config.vocab_size)
        self.device: torch.device = self.student.device
        decay = self.settings.weight_decay
        self.optimizer = torch.optim.AdamW(self.student.parameters(), betas=(0.9, 0.95), weight_decay=decay)

    def learn(self, text: Windows, step: int) -> None:
        """One step on one batch."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings.learning_rate_at(step, self.hidden_size)
        self.optimizer.zero_grad(set_to_none=True)
        windows = text.batch(step)
        tokens = sum(map(len, windows))
        at_once = max(1, _LOGITS_AT_ONCE // (self.vocabulary * max(map(len, windows))))
        for start in range(0, len(windows), at_once):
            loss = self._loss(Batch.of(windows[start : start + at_once])) / tokens
            if not torch.isfinite(loss):
                raise CompressionError(
                    f"distillation: the loss of step {step + 1} is not finite; lower --learning-rate"
                )
            loss.backward()  # type: ignore[no-untyped-call]
        with torch.no_grad():
            for name, mask in self.kept.items():
                gradient = self.student.get_parameter(name).grad
                if gradient is not None:
                    gradient *= mask
            torch.nn.utils.clip_grad_norm_(self.student.parameters(), 1.0)
            self.optimizer.step()
            for name, mask in self.kept.items():
                self.student.get_parameter(name).mul_(mask)

    def _loss(self, batch: Batch) -> Tensor:
        inputs, kept = batch.inputs.to(self.device), batch.kept.to(self.device)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=_multiplies_bf16(self.device)):
            with torch.no_grad():
                judged = self.teacher(input_ids=inputs, use_cache=False).logits[kept]
            said = self.student(input_ids=inputs, use_cache=False).logits[kept]
        settings = self.settings
        return distillation_loss(
            said.float(), judged.float(), batch.targets.to(self.device)[kept], temperature=settings.temperature,
            soft_weight=settings.soft_weight, hard_weight=settings.hard_weight,
        )  # fmt: skip

    def resume(self, checkpoint: Path) -> int:
        """The step to go on from."""
        if not checkpoint.exists():
            return 0
        state = torch.load(checkpoint, weights_only=True, map_location=self.device)
        self.student.load_state_dict(state["student"])
        self.optimizer.load_state_dict(state["optimizer"])
        return int(state["step"])

    def save(self, checkpoint: Path, step: int) -> None:
        """Whole or not at all."""
        state = {"step": step, "student": self.student.state_dict(), "optimizer": self.optimizer.state_dict()}
        aside = checkpoint.with_suffix(".new")
        torch.save(state, aside)
        aside.replace(checkpoint)


def _multiplies_bf16(device: torch.device) -> bool:
    """Whether products in bf16 are the faster ones here."""
    return device.type != "cpu" or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
