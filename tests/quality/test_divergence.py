"""Divergence: the same numbers as the textbook formulas, paired, with nothing hidden."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from serve.errors import CalibrationError
from serve.quality import (
    Divergence,
    StoredLogits,
    TokenScores,
    compare,
    model_logits,
    perplexity,
    read_texts,
    score_rows,
    tokenize,
)


@pytest.fixture
def rows() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    reference = torch.randn(150, 40, generator=generator, dtype=torch.float64) * 3
    variant = reference + torch.randn(150, 40, generator=generator, dtype=torch.float64) * 0.3
    return reference, variant, torch.randint(40, (150,), generator=generator)


def test_kl_and_losses_equal_the_formulas_in_float64(rows) -> None:  # type: ignore[no-untyped-def]
    reference, variant, targets = rows
    p, q = reference.softmax(-1), variant.softmax(-1)
    scores = score_rows(reference, variant, targets)
    torch.testing.assert_close(scores.kl_divergence, (p * (p.log() - q.log())).sum(-1), atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(scores.nll_variant, -q[torch.arange(150), targets].log(), atol=1e-5, rtol=1e-5)
    found = Divergence.of(scores)
    assert found.top1_agreement == pytest.approx((p.argmax(-1) == q.argmax(-1)).double().mean().item())
    delta = q[torch.arange(150), targets] - p[torch.arange(150), targets]
    assert found.rms_delta_p == pytest.approx(delta.square().mean().sqrt().item(), rel=1e-4)
    assert found.delta_p.mean == pytest.approx(delta.mean().item(), abs=1e-6)


def test_the_ratio_is_paired_so_its_error_is_far_below_the_perplexities_own(rows) -> None:  # type: ignore[no-untyped-def]
    found = Divergence.of(score_rows(*rows))
    assert found.perplexity_ratio == pytest.approx(math.exp(found.mean_ln_ratio))
    assert found.ln_perplexity_correlation > 0.95
    difference = score_rows(*rows).nll_variant - score_rows(*rows).nll_reference
    plain = (difference.var(unbiased=False) / (len(difference) - 1)).sqrt().item()
    assert found.mean_ln_ratio_standard_error == pytest.approx(plain, rel=1e-6)
    own = found.perplexity_variant.standard_error / found.perplexity_variant.value
    assert found.mean_ln_ratio_standard_error < own / 3


def test_percentiles_are_those_of_the_sorted_tokens(rows) -> None:  # type: ignore[no-untyped-def]
    scores = score_rows(*rows)
    found = Divergence.of(scores).kl_divergence
    assert found.median == pytest.approx(scores.kl_divergence.quantile(0.5).item())
    assert found.p99 == pytest.approx(scores.kl_divergence.quantile(0.99).item())
    assert (found.min, found.max) == (scores.kl_divergence.min().item(), scores.kl_divergence.max().item())


def test_non_finite_positions_are_counted_apart(rows) -> None:  # type: ignore[no-untyped-def]
    reference, variant, targets = rows
    clean = Divergence.of(score_rows(reference[:-2], variant[:-2], targets[:-2]))
    broken = variant.clone()
    broken[-2, 3], broken[-1] = float("nan"), float("inf")
    found = Divergence.of(score_rows(reference, broken, targets))
    assert found.non_finite_tokens == 2
    assert found.kl_divergence == clean.kl_divergence


def test_a_model_against_itself_is_exactly_zero_apart(rows) -> None:  # type: ignore[no-untyped-def]
    reference, _, targets = rows
    found = Divergence.of(score_rows(reference, reference, targets))
    assert found.kl_divergence.max == 0.0
    assert (found.perplexity_ratio, found.top1_agreement, found.accuracy.flips) == (1.0, 1.0, 0.0)


def test_a_token_the_reference_excludes_adds_nothing() -> None:
    reference = torch.tensor([[0.0, 0.0, -torch.inf]])
    variant = torch.tensor([[0.0, 0.0, 0.0]])
    scores = score_rows(reference, variant, torch.tensor([0]))
    assert scores.kl_divergence.item() == pytest.approx(math.log(3 / 2))


def test_intervals_draw_whole_records() -> None:
    """Ten texts that agree inside and differ between: the tokens' own error bar would be far too small."""
    record = torch.arange(10).repeat_interleave(200)
    values = record.double() / 10
    zeros, false = torch.zeros_like(values), torch.zeros_like(record, dtype=torch.bool)
    found = Divergence.of(TokenScores(values, zeros, zeros, false, false, false, record))
    low, high = found.kl_divergence_interval
    assert found.records == 10
    assert (high - low) / 2 > 5 * 1.96 * found.kl_divergence.standard_error
    assert low < found.kl_divergence.mean < high


def test_flips_count_both_directions_although_accuracy_ties() -> None:
    reference = torch.tensor([[2.0, 1.0], [1.0, 2.0]])
    found = Divergence.of(score_rows(reference, reference.flip(1), torch.tensor([0, 0])))
    assert (found.accuracy.reference, found.accuracy.variant) == (0.5, 0.5)
    assert (found.accuracy.flips, found.accuracy.lost, found.accuracy.gained) == (1.0, 0.5, 0.5)


def test_stored_logits_ask_their_source_once(tmp_path: Path) -> None:
    asked: list[tuple[int, ...]] = []

    def source(ids) -> torch.Tensor:  # type: ignore[no-untyped-def]
        asked.append(tuple(ids))
        return torch.tensor([[float(i), 1.0, 2.0] for i in ids])

    stored = StoredLogits(source, tmp_path / "logits")
    for ids in ([1, 2, 3], [4, 5], [1, 2, 3], [4, 5]):
        assert torch.equal(stored(ids), torch.tensor([[float(i), 1.0, 2.0] for i in ids]))
    assert asked == [(1, 2, 3), (4, 5)]


def test_fp32_perplexity_of_the_small_model_is_the_published_one(shared: Path) -> None:
    from serve.compression.recipe import Recipe
    from serve.loading import load

    loaded = load(str(shared / "models" / "TinyStories-656K"), Recipe.parse("fp32"))
    texts = read_texts(shared / "data" / "tinystories" / "eval.jsonl", 120)
    records = tokenize(loaded.tokenizer, texts, loaded.context_length)
    assert max(map(len, records)) <= 512
    assert perplexity(model_logits(loaded.model), records).value == pytest.approx(19.116, abs=0.001)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "low", "high"),
    [
        ("bf16", 0.0, 0.0004),
        ("int8", 0.0, 0.002),
        ("int8-weight", 0.0, 0.0005),
        ("fp32+int8-weight", 0.00025, 0.00035),
        ("nf4", 0.0585 * 0.85, 0.0585 * 1.15),
    ],
)
def test_divergence_from_fp32_is_what_the_field_measures(shared: Path, recipe: str, low: float, high: float) -> None:
    from serve.compression.recipe import Recipe
    from serve.loading import load

    source = str(shared / "models" / "TinyStories-656K")
    reference, variant = load(source, Recipe.parse("fp32")), load(source, Recipe.parse(recipe))
    texts = read_texts(shared / "data" / "tinystories" / "eval.jsonl", 120)
    records = tokenize(reference.tokenizer, texts, reference.context_length)
    found = compare(model_logits(reference.model), model_logits(variant.model), records)
    assert low <= found.kl_divergence.mean < high
    assert found.non_finite_tokens == 0


@pytest.mark.parametrize(
    ("content", "line"),
    [('{"txt": "a"}\n', ":1: not a record"), ('{"text": 3}\n', "text is a int"), ("\n", "holds no text")],
)
def test_unreadable_texts_are_refused_by_line(tmp_path: Path, content: str, line: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(content)
    with pytest.raises(CalibrationError, match=line):
        read_texts(path)


def test_plain_text_is_read_by_paragraphs(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("one\ntwo\n\n\nthree\n")
    assert read_texts(path) == ["one\ntwo\n", "three\n"]
    assert read_texts(path, 1) == ["one\ntwo\n"]
