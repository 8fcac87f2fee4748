"""Recipes: what parses, what is refused and why, and that nothing is lost on the way to a manifest and back."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve.compression.recipe import Recipe
from serve.compression.stages import Dense, Gptq, Int8, Nf4, RoundToNearest, Wanda
from serve.errors import RecipeError
from serve.loading import load

NAMES = [
    "fp32", "bf16", "fp16", "int8", "int8-weight", "int8-static", "llm-int8", "fp8", "nf4", "nf4-dq", "nf4-b128-dq",
    "rtn4", "rtn8-g32", "gptq4", "gptq3", "gptq8", "gptq4-g32-asym-act", "gptq4-row", "awq4", "magnitude50", "wanda50",
    "wanda-2:4", "sparsegpt50", "structured25", "depth25", "wanda50+gptq4-g64", "structured25+wanda-2:4+gptq4",
    "fp32+nf4", "gptq4+head8", "gptq4-damp0.1",
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_canonical_names_print_as_they_were_written(name: str) -> None:
    assert Recipe.parse(name).name == name


def test_defaults_are_those_of_the_design() -> None:
    assert Recipe.parse("gptq4").quantizer == Gptq(bits=4, group_size=128, symmetric=True)
    assert Recipe.parse("gptq4-g128-sym").name == "gptq4"
    assert Recipe.parse("int8").dtype == "bf16"


def test_a_list_a_mapping_and_a_string_mean_the_same() -> None:
    text = Recipe.parse("wanda-2:4+gptq4-g64")
    assert Recipe.parse(["wanda-2:4", {"method": "gptq", "bits": 4, "group_size": 64}]) == text
    assert Recipe.parse({"stages": ["wanda-2:4+gptq4-g64"]}) == text
    assert Recipe.parse({"method": "nf4"}) == Recipe.parse("nf4")


@pytest.mark.parametrize(
    ("name", "precision"),
    [("bf16", "bf16"), ("int8", "int8"), ("gptq4-g64-asym", "gptq4"), ("wanda50+gptq3", "gptq3"), ("wanda50", "bf16")],
)
def test_precision_is_the_stored_number_format(name: str, precision: str) -> None:
    assert Recipe.parse(name).precision == precision


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        ("int8+nf4", "two quantizers exclude each other"),
        ("gptq4+wanda50", "the order is structure, then pruning"),
        ("wanda50+sparsegpt50", "two ways to choose the zeros"),
        ("bf16+fp32+nf4", "two floating types"),
        ("int7", "unknown name 'int7'; known: fp32, bf16"),
        ("", "unknown name"),
        ("gptq5", "5 bits is not one of 2, 3, 4, 8"),
        ("gptq4-g7", "not a multiple of 8"),
        ("gptq4-g64-g32", "given twice"),
        ("gptq4-fast", "unknown option 'fast'; known: gN"),
        ("int8-g64", "unknown option 'g64'; known: none"),
        ("wanda", "lacks the percentage"),
        ("wanda100", "not a whole percentage"),
        ("nf4-b63", "block size 63"),
        ({"stages": ["int8"], "colour": 1}, "unknown key 'colour'"),
        ({"method": "gptq", "bits": "four"}, "expected int, got 'four'"),
        ({"method": "gptq", "bit": 4}, "unknown key 'bit'"),
        ({"method": "dense", "dtype": "fp8"}, "not one of fp32"),
        ({"stages": ["int8"], "lm_head": "int4"}, "not one of keep, int8"),
        ("int8+", r"'int8\+': nothing stands beside one of its \+"),
        ("wanda50-2:4", "exactly half; write wanda-2:4"),
        ("wanda-4:8", "unknown option '4:8'; known: 2:4, without a percentage"),
        ("wanda33.3", "33.3 % is not a whole percentage"),
        ("depth25+structured25+depth25", "depth25.depth25: the same method twice"),
        ("gptq4-g1000000000", "not a multiple of 8 up to 1048576, nor -1"),
        ("gptq٤", "unknown name"),
        ("x" * 5000, r"unknown name 'x{60}\.\.\.'; known"),
        ("int8-static-smooth2", "smooth 2.0 is not between 0"),
        ({"method": "int8-static", "smooth": float("nan")}, "smooth nan is not between 0"),
        ({"method": "llm-int8", "threshold": -1}, "threshold -1 is not a finite number"),
        ({"method": ["gptq"]}, r"unknown method \['gptq'\]"),
        ({"mixed": {"budget": 4}}, "recipe: mixed: unknown key 'budget'; known: budget_bits"),
        ({"mixed": {"method": "gptq"}}, "recipe: mixed: unknown key 'method'"),
        ({"mixed": {"budget_bits": 4}, "stages": ["gptq4"]}, "two quantizers"),
        ({"stages": ["int8+head8"], "lm_head": "keep"}, "keep contradicts the stage head8"),
        ({"stages": ["int8"], "skip": [5]}, "skip: 5 is not a pattern of module names"),
        ({"stages": ["int8"], "overrides": {"": "nf4"}}, "overrides: '' is not a pattern of module names"),
        ({"overrides": {"*.0.*": "int9"}}, r"overrides\.\*\.0\.\*: unknown name 'int9'"),
        ({"overrides": {"*.0.*": "depth25"}}, "depth25 cuts the whole model or nothing"),
        ({"overrides": {"*.0.*": "mixed4.5"}}, "mixed4.5 chooses for the whole model"),
        ({"overrides": {"*.0.*": "int8+head8"}}, "write lm_head: int8 beside the overrides"),
        ([3], "a stage is a name or a mapping"),
        (7, "expected a name"),
    ],
)
def test_nonsense_is_refused_with_the_reason(spec: object, reason: str) -> None:
    with pytest.raises(RecipeError, match=reason):
        Recipe.parse(spec)  # type: ignore[arg-type]


_options = st.fixed_dictionaries(
    {"bits": st.sampled_from([2, 3, 4, 8]), "group_size": st.sampled_from([-1, 8, 64, 128]), "symmetric": st.booleans()}
)
_quantizers = st.one_of(
    st.just(Int8()),
    st.builds(Nf4, block_size=st.sampled_from([32, 64, 128]), double_quantization=st.booleans()),
    _options.map(lambda o: RoundToNearest(**o)),
    _options.flatmap(lambda o: st.builds(lambda act: Gptq(**o, activation_order=act), st.booleans())),
)
_pruners = st.one_of(st.integers(1, 99).map(lambda n: Wanda(sparsity=n / 100)), st.just(Wanda(pattern="2:4")))


@given(
    st.sampled_from(["fp32", "bf16", "fp16"]),
    st.lists(_pruners, max_size=1),
    st.lists(_quantizers, max_size=1),
    st.sampled_from(["keep", "int8"]),
    st.lists(st.text(min_size=1, max_size=8), max_size=2),
)
def test_every_recipe_survives_its_name_and_its_manifest(dtype, pruners, quantizers, head, skip) -> None:  # type: ignore[no-untyped-def]
    recipe = Recipe(stages=(Dense(dtype), *pruners, *quantizers), lm_head=head)
    assert Recipe.parse(recipe.name) == recipe
    skipping = Recipe(stages=recipe.stages, lm_head=head, skip=tuple(skip))
    assert Recipe.from_dict(json.loads(json.dumps(skipping.to_dict()))) == skipping


@given(st.text(alphabet="abdefginpqrtwxy0123456789-+:. ", max_size=24))
def test_any_text_parses_or_raises_a_recipe_error(text: str) -> None:
    try:
        recipe = Recipe.parse(text)
    except RecipeError:
        return
    assert Recipe.parse(recipe.name) == recipe


@pytest.mark.parametrize(
    "name", ["gptq4-damp0.00001", "gptq4-g1000000", "mixed4.123456789", "int8-static-smooth0.123456789"]
)
def test_names_keep_every_digit(name: str) -> None:
    assert Recipe.parse(Recipe.parse(name).name) == Recipe.parse(name)


def test_a_pattern_that_matches_nothing_in_the_model_is_refused() -> None:
    recipe = Recipe.parse({"stages": ["int8"], "skip": ["model.layer.0.*"]})
    with pytest.raises(
        RecipeError, match=r"skip: 'model\.layer\.0\.\*' matches no layer of this model; they are called model"
    ):
        load("builtin:storyteller", recipe, device="cpu")
    with pytest.raises(RecipeError, match=r"overrides: 'lm_head' matches no layer"):
        load("builtin:storyteller", Recipe.parse({"stages": ["nf4"], "overrides": {"lm_head": "int8"}}), device="cpu")
    load("builtin:storyteller", Recipe.parse({"stages": ["int8"], "skip": ["lm_head"]}), device="cpu")


def test_reading_a_recipe_loads_no_torch() -> None:
    code = "import sys, serve.compression.recipe; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_list_of_names_is_the_names_joined() -> None:
    assert Recipe.parse(["structured50", "wanda50", "gptq4-g32"]) == Recipe.parse("structured50+wanda50+gptq4-g32")
    assert Recipe.parse(["fp32", "rtn4+head8"]) == Recipe.parse("fp32+rtn4+head8")
    with pytest.raises(RecipeError, match="two floating types"):
        Recipe.parse(["fp32", "bf16"])
