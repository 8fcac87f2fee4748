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


def test_reading_a_recipe_loads_no_torch() -> None:
    code = "import sys, serve.compression.recipe; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_list_of_names_is_the_names_joined() -> None:
    assert Recipe.parse(["structured50", "wanda50", "gptq4-g32"]) == Recipe.parse("structured50+wanda50+gptq4-g32")
    assert Recipe.parse(["fp32", "rtn4+head8"]) == Recipe.parse("fp32+rtn4+head8")
    with pytest.raises(RecipeError, match="two floating types"):
        Recipe.parse(["fp32", "bf16"])
