import dataclasses
import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dfrot.methods.dfrot import DFRot
from dfrot.pipeline.recipe import Recipe
from dfrot.quant.spec import Spec
from dfrot.system.errors import UserError

BITS = st.sampled_from([2, 3, 4, 5, 6, 7, 8, 16])


@given(BITS, st.none() | st.integers(1, 512), BITS, BITS)
def test_a_spec_prints_as_it_was_written(w: int, group: int | None, a: int, kv: int) -> None:
    text = f"w{w}{'' if group is None else f'g{group}'}a{a}kv{kv}"
    assert str(Spec.parse(text)) == text


@pytest.mark.parametrize("text", ["", "w4a4", "w4a4kv4 ", "W4A4KV4", "w4g-1a4kv4", "a4w4kv4", "w4ga4kv4", "w4.5a4kv4"])
def test_a_spec_that_does_not_parse_shows_the_grammar(text: str) -> None:
    with pytest.raises(UserError, match=re.escape(f"'{text}' does not parse. The grammar is w<bits>[g<group>]")):
        Spec.parse(text)


@pytest.mark.parametrize("text", ["w1a4kv4", "w4a9kv4", "w4a4kv0", "w32a4kv4", "w4g0a4kv4"])
def test_a_spec_out_of_range_is_refused(text: str) -> None:
    with pytest.raises(UserError, match=r"2 to 8, or 16|at least one entry"):
        Spec.parse(text)


def test_presets_fill_in_what_the_spec_leaves_open() -> None:
    paper, deploy = Spec.parse("w4a4kv4", "paper"), Spec.parse("w4a4kv4", "deploy")
    assert (paper.activations.symmetric, paper.activations.clip_ratio) == (False, 0.9)
    assert (paper.keys.symmetric, paper.keys.clip_ratio) == (False, 0.95)
    assert paper.values == paper.keys
    assert (paper.weights.symmetric, paper.weights.clip_ratio) == (True, None)
    assert deploy.activations.symmetric
    assert not paper.queries.enabled
    duquant = Spec.parse("w4a4kv4", "duquant")
    assert duquant.queries == duquant.keys
    assert (duquant.keys.clip_ratio, duquant.values.clip_ratio) == (0.9, 1.0)
    assert not Spec.parse("w4a4kv16", "duquant").queries.enabled


def test_queries_are_not_quantized_without_keys() -> None:
    with pytest.raises(UserError, match="queries take the grid of the keys, and 'w4a4kv16' leaves keys alone"):
        Spec.parse("w4a4kv16", quantize_queries=True)


def test_a_preset_can_be_overridden() -> None:
    spec = Spec.parse("w4a4kv4", act_symmetric=True, act_clip=1.0, kv_clip=1.0, weight_symmetric=False)
    assert (spec.activations.symmetric, spec.activations.clip_ratio, spec.keys.clip_ratio) == (True, 1.0, 1.0)
    assert spec.values == spec.keys
    assert not spec.weights.symmetric


@pytest.mark.parametrize(
    ("preset", "words", "keys", "values"),
    [
        ("paper", {"kv_clip": 0.8}, 0.8, 0.8),
        ("paper", {"value_clip": 0.7}, 0.95, 0.7),
        ("paper", {"kv_clip": 0.8, "value_clip": 0.7}, 0.8, 0.7),
        ("duquant", {"kv_clip": 0.8}, 0.8, 0.8),
        ("duquant", {"value_clip": 0.7}, 0.9, 0.7),
        ("duquant", {"value_clip": 0.7, "kv_clip": 0.8}, 0.8, 0.7),
    ],
)
def test_a_clip_ratio_of_values_comes_before_that_of_keys_and_values(
    preset: str, words: dict[str, float], keys: float, values: float
) -> None:
    spec = Spec.parse("w4a4kv4", preset, quantize_queries=True, **words)
    assert (spec.keys.clip_ratio, spec.values.clip_ratio, spec.queries.clip_ratio) == (keys, values, keys)


def test_a_fixed_clip_ratio_of_weights_can_be_overridden_by_a_search() -> None:
    assert Spec.parse("w4a4kv4", "duquant").weights.clip_ratio == 0.8
    assert Spec.parse("w4a4kv4", "duquant", weight_clip="search").weights.clip_ratio is None
    with pytest.raises(UserError, match="weight_clip is a number or one of search, got 'best'"):
        Spec.parse("w4a4kv4", weight_clip="best")


RECIPES = [
    Recipe.parse("none", spec="w16a16kv16"),
    Recipe.parse("quarot", rotation="orthogonal", head_mixing=True, seed=3),
    Recipe.parse("dfrot", gamma=10.0, calib="pydoc", calib_tokens=512, preset="deploy", dtype="float64"),
]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.method.name)
def test_a_recipe_survives_json(recipe: Recipe) -> None:
    assert Recipe.from_json(json.loads(json.dumps(recipe.to_json()))) == recipe


def test_recipes_that_differ_have_different_digests() -> None:
    others = [*RECIPES, dataclasses.replace(RECIPES[0], seed=1)]
    assert len({recipe.digest for recipe in others}) == len(others)
    assert RECIPES[2].digest == Recipe.from_json(RECIPES[2].to_json()).digest


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"method": "smoothquant"}, "no method 'smoothquant'. Methods: none, quarot, dfrot"),
        ({"weights": "awq"}, "no rounding 'awq'"),
        ({"preset": "best"}, "no preset 'best'. Presets: paper, deploy"),
        (
            {"method": "quarot", "gamma": 3.0},
            "'quarot' with 'gptq' weights has no option gamma; "
            "it takes act_order, block, fold_only, head_mixing, mean_keys, percdamp, rotation, target",
        ),
        (
            {"method": "none", "weights": "rtn", "rotation": "hadamard"},
            "'none' with 'rtn' weights has no option rotation; it takes mean_keys",
        ),
        (
            {"weights": "rtn", "sequences": 4, "calib_tokens": 4096},
            "reads 4 calibration sequences, of 2048 tokens, and 4096 tokens make 2",
        ),
        ({"weights": "gptq", "percdamp": -1.0}, "percdamp is a share of the mean diagonal, at least 0"),
        ({"gamma": 0.0}, "gamma is a positive weight or 'auto'"),
        ({"steps": 0}, "steps is at least 1"),
        ({"rotation": "hadamrd"}, "rotation is one of hadamard, orthogonal, got 'hadamrd'"),
        ({"method": "dfrot", "objective": "papr"}, "objective is one of recipe, paper"),
        ({"gamma": "best"}, "gamma is a number or one of auto, got 'best'"),
        ({"dtype": "int8"}, "dtype is one of auto, float16"),
        ({"spec": "nvfp4", "weights": "lwc"}, "nvfp4 has too few scales for a gradient. Take --weights gptq, or rtn"),
        ({"spec": "mxfp4", "tune": "scales"}, "--tune scales trains those of weights quantized to integers"),
        (
            {"spec": "mxfp4", "tune": "clips"},
            "clips trains those of activations, keys and values quantized to integers",
        ),
        ({"act_clip": 1.5}, "clip ratio is above 0 and at most 1"),
        ({"calib_tokens": 1}, "at least one sequence of two tokens"),
        ({"calib_tokens": 64, "calib_seq_len": 128}, "64 tokens in sequences of 128"),
        ({"calib_tokens": 3000}, "of 2048 tokens, which 3000 are not. Give --calib-tokens 2048 or 4096"),
    ],
)
def test_a_mistake_in_a_recipe_says_what_would_be_right(words: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        Recipe.parse(**words)  # type: ignore[arg-type]


@pytest.mark.parametrize("record", [{}, {"method": "dfrot"}, {"method": "x", "options": {}}])
def test_json_of_something_else_is_refused(record: dict[str, object]) -> None:
    with pytest.raises(UserError, match="not the recipe"):
        Recipe.from_json(record)


def test_what_is_not_given_has_its_default() -> None:
    assert Recipe.parse("dfrot", gamma=None, steps=None).method == DFRot()


def test_calibration_is_as_long_as_what_is_fitted_to_it() -> None:
    tokens = [
        Recipe.parse("dfrot", weights, sequences=samples).calibration.tokens
        for weights, samples in (("rtn", 1), ("rtn", 4), ("gptq", 4), ("gptq", 64))
    ]
    assert tokens == [2048, 4 * 2048, 32 * 2048, 64 * 2048]
