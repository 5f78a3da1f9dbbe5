"""Recipes: which rule decides, what is written down of them, and what is refused."""

import random
from typing import Any

import pytest

from afnext.quant.recipe import RECIPES, Recipe, fewest_rules, recipe
from afnext.quant.scheme import NF4, Fp4, Fp8, Int3, Int4, Int8, Int8Groups, SchemeError

MLP = "decoder.layers.11.mlp.up_proj"


def test_the_default_recipes() -> None:
    assert recipe("int8").scheme(MLP) == Int8()
    assert recipe("int8-w8a8").scheme(MLP) == Int8(int8_inputs=True)
    assert recipe("fp8").scheme(MLP) == recipe("fp8").scheme("encoder.layers.3.fc1") == Fp8()
    assert recipe("int4").scheme(MLP) == Int4(64)
    assert recipe("int4", group_size=32, symmetric=False).scheme(MLP) == Int4(32, symmetric=False)
    assert recipe("int4-g128-zeros").scheme(MLP) == Int4(128, symmetric=False)
    assert recipe("int4-w4a8").scheme(MLP) == Int4(64, int8_inputs=True)
    assert recipe("int4-w4a8", group_size=32).scheme(MLP) == Int4(32, int8_inputs=True)
    assert recipe("nf4").scheme(MLP) == NF4()
    assert recipe("nvfp4").scheme(MLP) == Fp4()
    assert recipe("mxfp4").scheme(MLP) == Fp4(powers_of_two=True)
    assert recipe("int3").scheme(MLP) == Int3(64)
    assert recipe("int3-g128").scheme(MLP) == Int3(128)
    assert recipe("int3").scheme("decoder.layers.0.self_attn.q_proj") == Int4(64)
    for layer in ("encoder.layers.3.fc1", "encoder.layers.3.self_attn.q_proj"):
        assert recipe("int3").scheme(layer) == recipe("small").scheme(layer)
    for name in RECIPES:
        for layer in ("decoder.lm_head", "decoder.embed_tokens"):
            assert recipe(name).scheme(layer) == (Int4(64) if name in ("small", "int3") else Int8())
        assert recipe(name).scheme("adaptor.linear_2") == Int8()
        for layer in ("encoder.conv1", "encoder.embed_positions", "decoder.norm"):
            assert recipe(name).scheme(layer) is None
    assert recipe("int4").scheme("encoder.layers.3.fc1") == Int8()
    for name in ("int8-w8a8", "int4-w4a8", "int4-g32-zeros-w4a8"):
        assert recipe(name).scheme("encoder.layers.3.fc1") == Int8(int8_inputs=True)


def test_rules_given_come_first() -> None:
    mixed = recipe("int4", rules=[("*.mlp.down_proj", "int8"), ("decoder.layers.0.*", "dense")])
    assert mixed.scheme("decoder.layers.0.mlp.down_proj") == Int8()
    assert mixed.scheme("decoder.layers.0.mlp.up_proj") is None
    assert mixed.scheme("decoder.layers.1.mlp.up_proj") == Int4(64)


def test_what_is_written_down_is_read_back() -> None:
    for name in RECIPES:
        one = recipe(name, rules=[("decoder.layers.0.*", "dense"), ("decoder.lm_head", "int4-g32-zeros")])
        again = Recipe.from_dict(one.to_dict())
        assert again == one
        assert (again.name, again.source) == (one.name, one.source)


def test_long_patterns_and_lists_of_rules_are_refused() -> None:
    written = recipe("int8").to_dict()
    for rules, message in (([["[" * 50_000, "int8"]], "50,000 characters"), ([["a", "int8"]] * 2000, "2,000 rules")):
        with pytest.raises(SchemeError, match=message):
            Recipe.from_dict(written | {"rules": rules})
    with pytest.raises(SchemeError, match="characters"):
        recipe("int8", rules=[("[" * 50_000, "int8")])


def test_equal_rules_are_equal_recipes() -> None:
    assert recipe("int4", group_size=32) == recipe("int4-g32") != recipe("int4")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "int2"}, "int2.*int8-w8a8"),
        ({"name": "int4-g7"}, "not 7"),
        ({"name": "int4", "group_size": 48}, "not 48"),
        ({"name": "int8", "group_size": 64}, "only int4"),
        ({"name": "int4-g32", "symmetric": False}, "only int4"),
        ({"name": "small", "group_size": 32}, "small has no group size"),
        ({"name": "small", "symmetric": False}, "small has no group size"),
        ({"name": "int4", "rules": [("decoder.*", "int9")]}, "int9"),
    ],
)
def test_what_does_not_exist_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(SchemeError, match=message):
        recipe(**arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"quant_method": "gptq"}, "another library"),
        ({"version": 2}, "version 2"),
        ({"version": "1"}, "version"),
        ({"recipe": None}, "damaged"),
        ({"rules": "decoder.*"}, "damaged"),
        ({"rules": [["decoder.*"]]}, "damaged"),
        ({"rules": [["decoder.*", 4]]}, "damaged"),
        ({"rules": [["decoder.*", "int4-g5"]]}, "not 5"),
        ({"source": 7}, "damaged"),
    ],
)
def test_damaged_quantizations_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(SchemeError, match=message):
        Recipe.from_dict(recipe("int4").to_dict() | change)
    with pytest.raises(SchemeError, match="another library"):
        Recipe.from_dict([])


def test_the_small_recipe_has_four_bits_nearly_everywhere() -> None:
    small = recipe("small", rules=[("decoder.layers.0.*", "int8")])
    assert small.name == "small"
    for layer in ("decoder.lm_head", "decoder.embed_tokens", "encoder.layers.3.fc1", MLP):
        assert small.scheme(layer) == Int4(64)
    for layer in ("encoder.layers.3.self_attn.q_proj", "adaptor.linear_1", "decoder.layers.0.mlp.up_proj"):
        assert small.scheme(layer) == Int8()


def test_the_fewest_rules_give_each_layer_its_scheme(seed: int) -> None:
    for _ in range(50):
        layers = [f"decoder.layers.{i}.mlp.{kind}" for i in range(3) for kind in ("up_proj", "down_proj")]
        layers += ["encoder.layers.0.fc1", "encoder.layers.1.fc1", "adaptor.linear_1", "decoder.lm_head"]
        choices = random.sample([None, Int8(), Int4(32), NF4()], random.randint(1, 4))
        schemes = {layer: random.choice(choices) for layer in layers}
        rules = fewest_rules(schemes)
        assert {layer: Recipe("x", rules).scheme(layer) for layer in layers} == schemes
        assert len(rules) <= len(layers)
    assert fewest_rules(dict.fromkeys(layers, Int8())) == (
        ("decoder.layers.*", Int8()),
        ("encoder.layers.*", Int8()),
        ("adaptor.*", Int8()),
        ("decoder.lm_head", Int8()),
    )


def test_an_extended_recipe_leaves_what_is_packed(seed: int) -> None:
    stored = Recipe("gguf-q8_0", (("decoder.layers.*", Int8Groups(32)),))
    layers = ["decoder.layers.0.mlp.up_proj", "decoder.lm_head"]
    whole = stored.extended(recipe("int4"), layers)
    assert whole.extends(stored)
    assert whole.scheme(layers[0]) == Int8Groups(32)
    assert whole.scheme(layers[1]) == Int8()
    assert not recipe("int4").extends(stored)
    same = recipe("int4", rules=[("*.up_proj", "int8-g32")])
    assert stored.extended(same, layers).scheme(layers[0]) == Int8Groups(32)
    with pytest.raises(SchemeError, match=r"up_proj is int8-g32 already, and int4-g32 would round"):
        stored.extended(recipe("int4", rules=[("*.up_proj", "int4-g32")]), layers)
