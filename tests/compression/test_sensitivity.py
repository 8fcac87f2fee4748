"""Mixed precision: the budget is kept, the sensitive layers get the bits, and it beats uniform precision for it."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from serve.compression.artifact import Draft
from serve.compression.calibration import Calibration
from serve.compression.loader import Loader
from serve.compression.recipe import Recipe
from serve.compression.sensitivity import Choice, choose, measure_sensitivity
from serve.errors import RecipeError
from serve.loading import LoadedModel, load
from serve.loading import measure_sensitivity as measure_effects_of
from serve.quality import compare, model_logits, read_texts, tokenize


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def tiny(shared: Path) -> str:
    return str(shared / "models" / "TinyStories-656K")


@pytest.fixture
def calibration(shared: Path) -> Calibration:
    return Calibration(shared / "data" / "tinystories" / "calib.jsonl", num_samples=8, max_tokens=64)


def three(kl: float) -> list[Choice]:
    """Two, four and eight bits of a layer; each bit less costs about four times as much."""
    return [Choice("a", 2, kl), Choice("b", 4, kl / 16), Choice("c", 8, kl / 4096)]


def cost(choices: dict[str, list[Choice]], weights: dict[str, int], picked: dict[str, str]) -> tuple[float, float]:
    found = {name: next(c for c in choices[name] if c.recipe == recipe) for name, recipe in picked.items()}
    bits = sum(choice.bits * weights[name] for name, choice in found.items()) / sum(weights.values())
    return bits, sum(choice.kl_divergence for choice in found.values())


@given(
    st.lists(st.floats(1e-6, 1.0), min_size=1, max_size=5),
    st.lists(st.integers(1, 8), min_size=5, max_size=5),
    st.floats(2.0, 8.0),
)
def test_the_budget_is_kept_and_the_rest_is_nearly_the_best(kls: list[float], sizes: list[int], budget: float) -> None:
    choices = {f"layer{i}": three(kl) for i, kl in enumerate(kls)}
    weights = {name: 1000 * size for name, size in zip(choices, sizes, strict=False)}
    bits, divergence = cost(choices, weights, choose(choices, weights, budget))
    assert bits <= budget + 1e-9
    every = (dict(zip(choices, picked, strict=True)) for picked in product("abc", repeat=len(choices)))
    feasible = [cost(choices, weights, picked) for picked in every]
    best = min(kl for spent, kl in feasible if spent <= budget)
    assert divergence <= best + max(kls)  # greedy leaves at most one layer's worth on the table


def test_a_budget_below_the_least_gives_the_least() -> None:
    assert choose({"x": three(1.0)}, {"x": 10}, 1.0) == {"x": "a"}


def test_a_choice_that_costs_more_and_loses_no_less_is_never_taken() -> None:
    choices = {"x": [Choice("good", 4, 0.1), Choice("bad", 5, 0.2), Choice("best", 6, 0.05)]}
    assert choose(choices, {"x": 10}, 5.5) == {"x": "good"}


def test_measuring_leaves_the_model_as_it_was_and_finer_formats_lose_less(tiny: str, calibration: Calibration) -> None:
    with Loader.opened(tiny, Recipe.parse("fp32")) as loader:
        loader.fill(None)
        skeleton, ids = loader.skeleton, torch.arange(3, 40)[None]
        samples = calibration.samples(lambda text: list(loader.tokenizer(text)["input_ids"]), 64)
        with torch.no_grad():
            before = skeleton.model(ids).logits
            found = measure_sensitivity(
                skeleton, samples, torch.device("cpu"), ["gptq3-g64", "gptq4-g64", "gptq8", "bf16", "fp32"]
            )
            assert torch.equal(skeleton.model(ids).logits, before)
    assert set(found) == set(skeleton.projections)
    for choices in found.values():
        divergences = [choice.kl_divergence for choice in choices]
        assert divergences == sorted(divergences, reverse=True)
        assert divergences[0] > 0
        assert [round(choice.bits, 2) for choice in choices[:2]] == [3.25, 4.25]
        assert [choice.bits for choice in choices[-2:]] == [16, 32]
        assert choices[-1].kl_divergence == 0


def test_mixed_recipes_are_written_either_way() -> None:
    assert Recipe.parse({"mixed": {"budget_bits": 4.25}}) == Recipe.parse("mixed4.25")
    assert Recipe.parse("wanda50+mixed4.5").name == "wanda50+mixed4.5"
    assert Recipe.parse("mixed").precision == "mixed4.5"


def logits(loaded: LoadedModel) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = loaded.model(torch.arange(3, 60)[None]).logits
        return found


@pytest.mark.slow
def test_a_mixed_model_keeps_its_budget_and_its_choices_in_the_artifact(
    tiny: str, calibration: Calibration, tmp_path: Path
) -> None:
    recipe = Recipe.parse("mixed4")
    made = load(tiny, recipe, calibration=calibration, artifacts=tmp_path / "store")
    assert 3.8 < made.report.bits_per_weight <= 4
    assert len({target for _, target in made.recipe.overrides}) > 1
    again = load(tiny, recipe, calibration=calibration, artifacts=tmp_path / "store")
    assert again.report.artifact_hit
    assert again.recipe == made.recipe
    assert torch.equal(logits(again), logits(made))


def test_an_attempt_that_goes_on_keeps_the_choices_it_began_with(
    tiny: str, calibration: Calibration, tmp_path: Path
) -> None:
    begun = replace(Recipe.parse("mixed4.5"), overrides=(("*.q_proj", "rtn4"), ("*", "bf16")))
    with Loader.opened(tiny, Recipe.parse("mixed4.5"), calibration=calibration) as loader:
        draft = Draft(tmp_path / "attempt", loader.fingerprint)
        draft.remember("recipe", begun.to_dict())
        loader.compress(draft)
        assert loader.recipe == begun
        artifact = draft.finish(tmp_path / "done", {})
    assert {path.name for path in artifact.folder.glob("*.json")} == {"manifest.json"}


@pytest.mark.parametrize(("model", "layer", "bits"), [("bf16", "fp32", 32), ("fp32", "bf16", 16)])
def test_a_layer_may_be_kept_in_a_floating_type_of_its_own(
    tiny: str, model: str, layer: str, bits: int, tmp_path: Path
) -> None:
    name = "model.layers.1.mlp.down_proj"
    recipe = Recipe.parse({"stages": [model], "overrides": {name: layer}})
    made, again = (load(tiny, recipe, device="cpu", artifacts=tmp_path / "store") for _ in range(2))
    kept = made.model.get_submodule(name)
    assert kept.storage().weight_bytes * 8 == bits * kept.in_features * kept.out_features
    assert torch.equal(logits(again), logits(made))
    x = torch.randn(5, kept.in_features, dtype=kept.spec.dtype)
    torch.testing.assert_close(kept(x), kept.reference(x), atol=1e-5, rtol=1e-2 if model == "bf16" else 1e-4)


def test_a_budget_that_allows_it_keeps_layers_in_32_bits(tiny: str, calibration: Calibration) -> None:
    wide = {name: [Choice("bf16", 16, kl), Choice("fp32", 32, 0)] for name, kl in (("calm", 1e-9), ("loud", 1e-5))}
    assert choose(wide, {"calm": 10, "loud": 10}, 24) == {"calm": "bf16", "loud": "fp32"}
    assert Recipe.parse("mixed24").quantizer is not None


@pytest.mark.slow
def test_mixed_beats_uniform_precision_at_equal_bytes(shared: Path, tiny: str) -> None:
    calibration = Calibration(shared / "data" / "tinystories" / "calib.jsonl")
    reference = load(tiny, Recipe.parse("fp32"))
    texts = read_texts(shared / "data" / "tinystories" / "eval.jsonl", 120)
    records = tokenize(reference.tokenizer, texts, reference.context_length)
    found = {}
    for recipe in ("mixed4.5", "gptq4-g32"):
        variant = load(tiny, Recipe.parse(recipe), calibration=calibration)
        assert variant.report.bits_per_weight <= 4.5
        found[recipe] = compare(model_logits(reference.model), model_logits(variant.model), records).kl_divergence.mean
    assert found["mixed4.5"] < found["gptq4-g32"]


@pytest.mark.parametrize("recipe", ["gptq3-g64", "wanda50+rtn4", "int8"])
def test_each_part_is_measured_alone_and_a_layer_loses_more_than_any_of_its_parts(
    tiny: str, calibration: Calibration, recipe: str
) -> None:
    parts, layers = (
        measure_effects_of(tiny, Recipe.parse(recipe), by, device="cpu", calibration=calibration)
        for by in ("projection", "layer")
    )
    assert len(parts) == 14
    assert [layer.name for layer in layers] == ["model.layers.0", "model.layers.1"]
    for layer in layers:
        inside = [part for part in parts if part.name.startswith(layer.name)]
        assert layer.weights == sum(part.weights for part in inside)
        assert layer.kl_divergence > max(part.kl_divergence for part in inside) > 0
    skipped = replace(Recipe.parse(recipe), skip=("*.layers.0.*",))
    left = measure_effects_of(tiny, skipped, "projection", device="cpu", calibration=calibration)
    assert left == [part for part in parts if part.name.startswith("model.layers.1")]


def test_what_is_no_change_to_a_layer_has_no_sensitivity(tiny: str) -> None:
    for recipe in ("structured25", "mixed4.5", "bf16"):
        with pytest.raises(RecipeError, match="name such a recipe"):
            measure_effects_of(tiny, Recipe.parse(recipe), "layer")
