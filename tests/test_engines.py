"""Which engines can take a checkpoint: each answer against what decides it."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from strategies import shapes

from shortllama import catalogue, configs, engines
from shortllama.exporting import llamacpp
from shortllama.shape import BlockShape, ModelShape

ALL, NONE = {"transformers", "vLLM", "llama.cpp"}, set()


def shape_like(heads: int = 32, groups: int = 8, neurons: int = 96, **changes: Any) -> ModelShape:
    fields: dict[str, Any] = {"vocabulary": 97, "hidden": 2048, "head_dim": 64, "blocks": 3}
    return ModelShape.uniform(**{**fields, **changes}, query_heads=heads, kv_heads=groups, neurons=neurons)


def written(shape: ModelShape, **changes: Any) -> configs.Config:
    """The config.json that a folder of this shape has."""
    config = {**configs.config_of(shape), **changes}
    return configs.stock_config(config, shape) or configs.own_config(config, shape)


def mixed(*blocks: tuple[int, int, int], **changes: Any) -> ModelShape:
    return msgspec.structs.replace(shape_like(**changes), blocks=tuple(BlockShape(*block) for block in blocks))


QKV = ("q", "k", "v")
CASES = {
    "dense": (shape_like(), {}, ALL, "as llama"),
    "odd heads": (shape_like(24 + 3, 9), {}, ALL, "as mistral"),
    "widths": (mixed((32, 8, 9), (28, 7, 9)), {}, {"llama.cpp"}, "different widths"),
    "modules": (mixed((0, 0, 9), (28, 7, 0)), {}, {"llama.cpp"}, "without attention or FFN"),
    "partial biases": (shape_like(27, 9, biases=("o", "down")), {}, {"llama.cpp"}, "biases o, down"),
    "seed_oss": (shape_like(27, 9, biases=("o",)), {}, {"transformers", "llama.cpp"}, "q, k, v only"),
    "seed_oss in vLLM": (shape_like(27, 9, biases=QKV), {}, ALL, "as seed_oss"),
    "small heads": (shape_like(head_dim=16), {}, {"transformers", "llama.cpp"}, "32 to 256"),
    "qwen3": (shape_like(family="qwen3", qk_norm=True), {}, ALL, "as qwen3, by export"),
    "qwen3 widths": (mixed((32, 8, 9), (28, 7, 9), family="qwen3", qk_norm=True), {}, NONE, "one size for all blocks"),
    "queries a group": (shape_like(24, 8), {}, ALL, "as mistral"),
    "queries of each block": (mixed((32, 8, 9), (24, 8, 9)), {}, {"llama.cpp"}, "as deci"),
    "phi3": (shape_like(family="phi3"), {}, ALL, "as phi3, by export"),
    "window": (shape_like(family="mistral"), {"sliding_window": 8}, {"transformers", "vLLM"}, "sliding window"),
    "rotary": (
        shape_like(),
        {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}},
        {"transformers", "vLLM"},
        "yarn",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_each_engine_takes_what_it_can_and_says_why(name: str):
    shape, changes, can, says = CASES[name]
    found = engines.fits(shape, written(shape, **changes))
    assert [fit.engine for fit in found] == ["transformers", "vLLM", "llama.cpp"]
    assert {fit.engine for fit in found if fit.can} == can
    assert any(says in fit.why for fit in found)
    assert not any("\n" in fit.why for fit in found)


@pytest.mark.parametrize("family", ["mamba", "gemma2"])
def test_families_without_gguf_form(family: str):
    sizes = {"vocab_size": 97, "hidden_size": 64, "num_hidden_layers": 3, "state_size": 4}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32, "intermediate_size": 9}
    config = {"model_type": family, **sizes, **(heads if family == "gemma2" else {})}
    found = engines.fits(configs.shape_of(config), config)
    assert {fit.engine for fit in found if fit.can} == {"transformers", "vLLM"}
    assert f"this is a {family} model" in found[2].why


def test_rwkv_is_for_transformers_without_its_cache():
    config = {"model_type": "rwkv", "vocab_size": 97, "hidden_size": 64, "num_hidden_layers": 3}
    found = engines.fits(configs.shape_of(config), config)
    assert [fit.can for fit in found] == [True, False, False]
    assert "use_cache=False" in found[0].why
    assert found[1].why == "it has no rwkv"


@settings(max_examples=60)
@given(shapes())
def test_transformers_takes_a_shape_exactly_where_a_stock_config_exists(shape: ModelShape):
    base = configs.config_of(shape)
    by_name = {fit.engine: fit for fit in engines.fits(shape, written(shape))}
    assert by_name["transformers"].can == (configs.stock_config(base, shape) is not None)
    assert by_name["transformers"].can or not by_name["vLLM"].can


@pytest.mark.parametrize("name", catalogue.names())
def test_what_the_paper_calls_a_model_fits_where_the_rules_say(name: str):
    shape = catalogue.lookup(name)
    by_name = {fit.engine: fit for fit in engines.fits(shape, written(shape))}
    uniform = shape.is_uniform
    assert by_name["transformers"].can == by_name["vLLM"].can == uniform
    assert by_name["llama.cpp"].can == (shape.family in llamacpp.FAMILIES)
    if by_name["llama.cpp"].can:
        own = llamacpp.FAMILIES[shape.family]
        assert by_name["llama.cpp"].why.startswith(f"as {own.name if uniform else own.varied},")
