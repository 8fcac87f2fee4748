"""What a token teaches, and which text a step gets: exactly what is written, and the same every time."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from serve.distillation import Settings
from serve.distillation.gradual import lessons
from serve.distillation.objective import IGNORED, distillation_loss
from serve.distillation.windows import Batch, Windows, cut
from serve.errors import CalibrationError, ConfigError


def by_hand(student: torch.Tensor, teacher: torch.Tensor, targets: torch.Tensor, t: float, a: float, b: float) -> float:
    total = 0.0
    for s, q, target in zip(student.double(), teacher.double(), targets.tolist(), strict=True):
        p, r = (q / t).exp() / (q / t).exp().sum(), (s / t).exp() / (s / t).exp().sum()
        total += a * t * t * float((p * (p / r).log()).sum())
        if target != IGNORED:
            total -= b * float((s.exp() / s.exp().sum())[target].log())
    return total


@pytest.mark.parametrize(("soft", "hard"), [(0.7, 0.3), (1.0, 0.0), (0.0, 1.0)])
@pytest.mark.parametrize("temperature", [1.0, 2.0, 4.0])
def test_the_loss_is_hintons(temperature: float, soft: float, hard: float) -> None:
    torch.manual_seed(0)
    student, teacher = torch.randn(6, 11), 3 * torch.randn(6, 11)
    targets = torch.tensor([1, 4, IGNORED, 0, 10, IGNORED])
    found = distillation_loss(
        student, teacher, targets, temperature=temperature, soft_weight=soft, hard_weight=hard
    ).item()
    assert found == pytest.approx(by_hand(student, teacher, targets, temperature, soft, hard), rel=1e-5)


def test_the_gradient_keeps_its_size_as_the_temperature_rises() -> None:
    """Hinton's reason for T squared: in the limit the gradient is the difference of the (centred) logits."""
    torch.manual_seed(0)
    teacher, targets, sizes = torch.randn(4, 9), torch.zeros(4, dtype=torch.int64), []
    for temperature in (50.0, 100.0):
        student = torch.zeros(4, 9, requires_grad=True)
        distillation_loss(student, teacher, targets, temperature=temperature, soft_weight=1, hard_weight=0).backward()  # type: ignore[no-untyped-call]
        assert student.grad is not None
        sizes.append(student.grad)
    centred = (teacher - teacher.mean(1, keepdim=True)) / 9
    torch.testing.assert_close(sizes[1], -centred, atol=1e-3, rtol=0.05)
    torch.testing.assert_close(sizes[0], sizes[1], atol=1e-3, rtol=0.05)


@given(st.lists(st.integers(2, 9), min_size=1, max_size=40), st.integers(1, 7), st.integers(0, 3))
def test_a_step_decides_its_text_alone_and_an_epoch_repeats_nothing(sizes: list[int], batch: int, seed: int) -> None:
    windows = [[index] * size for index, size in enumerate(sizes)]
    steps = len(windows) // min(batch, len(windows))
    first, other = Windows(windows, batch, seed), Windows(windows, batch, seed)
    dealt = [first.batch(step) for step in range(2 * steps)]
    assert other.batch(2 * steps - 1) == dealt[-1]
    assert other.batch(0) == dealt[0]
    for epoch in (dealt[:steps], dealt[steps:]):
        met = [window[0] for windows in epoch for window in windows]
        assert len(met) == len(set(met)) == steps * min(batch, len(windows))


def test_a_batch_learns_each_next_token_and_nothing_of_its_padding() -> None:
    batch = Batch.of([[5, 6, 7], [8, 9]])
    assert batch.inputs.tolist() == [[5, 6, 7], [8, 9, 0]]
    assert batch.targets.tolist() == [[6, 7, IGNORED], [9, IGNORED, IGNORED]]
    assert batch.kept.tolist() == [[True, True, True], [True, True, False]]
    assert cut([[1, 2, 3, 4, 5], [6]], 2) == [[1, 2], [3, 4]]


def test_the_learning_rate_rises_then_falls_and_suits_the_width() -> None:
    settings = Settings(steps=100, warmup_steps=10)
    rates = [settings.learning_rate_at(step, 128) for step in range(100)]
    assert max(rates) == pytest.approx(0.4 / 128)
    assert rates.index(max(rates)) == 9
    assert rates[:10] == sorted(rates[:10])
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert 0 < rates[-1] < 0.02 * max(rates)


@pytest.mark.parametrize(("each", "steps"), [(100, 3), (1, 3), (7, 2), (50, 1)])
def test_half_of_every_steps_lessons_are_saved_for_the_model_that_stays(each: int, steps: int) -> None:
    shares = [lessons(Settings(steps=each), number, steps) for number in range(1, steps + 1)]
    assert sum(share.steps for share in shares) == each * steps
    assert [share.anneal for share in shares] == [False] * (steps - 1) + [True]
    if each > 1 and steps > 1:
        assert shares[-1].steps > shares[0].steps
    for share in shares[:-1]:
        assert share.learning_rate_at(share.steps - 1, 128) == pytest.approx(0.4 / 128)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"steps": 0}, "steps"),
        ({"window_tokens": 1}, "window_tokens"),
        ({"temperature": 0.0}, "temperature"),
        ({"learning_rate": -1.0}, "learning_rate"),
        ({"soft_weight": 0.0, "hard_weight": 0.0}, "soft_weight"),
    ],
)
def test_senseless_settings_are_refused_by_name(options: dict[str, float], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        Settings(**options)  # type: ignore[arg-type]


def test_no_text_is_refused() -> None:
    with pytest.raises(CalibrationError, match="no two tokens"):
        Windows([], 4, 0)
