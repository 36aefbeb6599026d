"""config.json to shape and back, against the stock config and model classes of transformers."""

from __future__ import annotations

import copy

import msgspec
import pytest
from hypothesis import given, settings
from strategies import shapes

from shortllama import configs
from shortllama.errors import InputError, UnsupportedError
from shortllama.families import FAMILIES
from shortllama.plans import BlockKeep
from shortllama.shape import BlockShape, ModelShape

SIZES = {
    "vocab_size": 50,
    "hidden_size": 48,
    "intermediate_size": 20,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 8,
}
VARIANTS = [
    ("llama", {}),
    ("llama", {"attention_bias": True}),
    ("llama", {"mlp_bias": True, "tie_word_embeddings": True}),
    ("llama", {"num_key_value_heads": None, "head_dim": None}),
    ("mistral", {}),
    ("mistral", {"head_dim": None}),
    ("qwen2", {}),
    ("qwen2", {"tie_word_embeddings": True}),
    ("qwen3", {}),
    ("qwen3", {"attention_bias": True}),
]


def config(family: str, **changes: object) -> configs.Config:
    """A config.json as save_pretrained writes it."""
    return {"model_type": family, **SIZES, **changes}


def uniform(heads: int, kv: int, neurons: int = 20, family: str = "llama", **fields: object) -> ModelShape:
    return ModelShape.uniform(
        family=family,
        vocabulary=50,
        hidden=48,
        head_dim=8,
        blocks=3,
        query_heads=heads,
        kv_heads=kv,
        neurons=neurons,
        **fields,  # pyright: ignore[reportArgumentType]
    )


@pytest.mark.parametrize(("family", "changes"), VARIANTS)
def test_a_shape_has_the_parameters_of_the_stock_model(family: str, changes: dict):
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    fields = {**SIZES, **changes}
    with torch.device("meta"):
        stock = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **fields))
    counted = sum(parameter.numel() for parameter in stock.parameters())
    assert configs.shape_of(config(family, **changes)).parameters == counted
    assert configs.shape_of(stock.config.to_dict()).parameters == counted


@pytest.mark.parametrize("family", [name for name, family in FAMILIES.items() if family.mixer is None])
def test_absent_fields_mean_what_the_stock_class_means(family: str):
    from transformers import AutoConfig

    fields = {name: SIZES[name] for name in SIZES if name not in ("num_key_value_heads", "head_dim")}
    fields |= {"num_attention_heads": 32, "hidden_size": 256}
    stock = AutoConfig.for_model(family, **fields)
    shape = configs.shape_of({"model_type": family, **fields})
    assert shape.blocks[0].kv_heads == (stock.num_key_value_heads or stock.num_attention_heads)
    assert shape.head_dim == (getattr(stock, "head_dim", None) or 256 // 32)
    assert shape.tied == stock.tie_word_embeddings


@pytest.mark.parametrize(
    ("family", "hidden"), [("gpt_neox", 256), ("mamba", 64), ("falcon_mamba", 64), ("mamba2", 4096)]
)
def test_absent_fields_of_stacks_mean_what_the_stock_class_means(family: str, hidden: int):
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    fields = {"vocab_size": 50, "hidden_size": hidden, "num_hidden_layers": 1, "pad_token_id": None}
    fields |= {"intermediate_size": 20} if family == "gpt_neox" else {}
    given = fields | ({"num_attention_heads": 64} if family == "gpt_neox" else {})
    with torch.device("meta"):
        stock = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **fields))
    shape = configs.shape_of({"model_type": family, **given})
    assert shape.parameters == sum(parameter.numel() for parameter in stock.parameters())
    assert shape.tied == stock.config.tie_word_embeddings


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
@pytest.mark.parametrize("used", [True, False])
def test_layer_types_of_old_files_follow_the_stock_rule(family: str, used: bool):
    from transformers import AutoConfig

    fields = {"use_sliding_window": used, "sliding_window": 4, "max_window_layers": 1}
    stock = AutoConfig.for_model(family, **SIZES, **fields)
    found = configs.layer_types(config(family, **fields))
    assert found == (list(stock.layer_types) if used else None)
    assert configs.layer_types(stock.to_dict()) == list(stock.layer_types)


def test_pruning_slices_per_layer_lists_and_mutates_nothing():
    base = config("qwen2", layer_types=["full_attention", "sliding_attention", "full_attention"])
    before = copy.deepcopy(base)
    pruned = configs.pruned_config(base, (BlockKeep(0), BlockKeep(2, "0")))
    assert base == before
    assert pruned["num_hidden_layers"] == 2
    assert pruned["layer_types"] == ["full_attention", "full_attention"]
    pruned["layer_types"].append("x")
    assert base == before


def test_an_attention_between_kinds_cannot_be_removed_alone():
    base = config("qwen2", layer_types=["full_attention", "sliding_attention", "full_attention"])
    with pytest.raises(UnsupportedError, match="attention of block 2 cannot be removed alone"):
        configs.pruned_config(base, (BlockKeep(0), BlockKeep(1), BlockKeep(2, "")))
    configs.pruned_config(base, (BlockKeep(0), BlockKeep(2, "")))  # one kind is left


@pytest.mark.parametrize(
    ("shape", "family"),
    [
        (uniform(6, 3), "llama"),
        (uniform(4, 2, 11), "llama"),
        (uniform(5, 5), "mistral"),  # 48 is not a multiple of 5: LlamaConfig refuses
        (uniform(5, 5, biases=("q", "k", "v", "o")), "seed_oss"),  # mistral has no biases
        (uniform(5, 5, biases=("o", "gate", "up", "down")), "seed_oss"),
        (uniform(6, 3, biases=("q", "k", "v", "o", "gate", "up", "down")), "llama"),
        (uniform(6, 3, biases=("o", "down")), None),  # no class has a bias on down alone
        (uniform(5, 5, family="qwen2", biases=("q", "k", "v")), "qwen2"),
        (uniform(5, 5, family="qwen3", qk_norm=True), "qwen3"),
        (uniform(0, 0), None),
        (uniform(6, 3, 0), None),
        (msgspec.structs.replace(uniform(6, 3), blocks=(BlockShape(6, 3, 20), BlockShape(4, 2, 20))), None),
    ],
)
def test_the_stock_class_that_can_express_a_shape(shape: ModelShape, family: str | None):
    base = config(shape.family, num_hidden_layers=len(shape.blocks), attention_bias="o" in shape.biases)
    found = configs.stock_config(base, shape)
    assert (found or {}).get("model_type") == family
    if found:
        from transformers import AutoConfig

        assert configs.shape_of(found) == shape
        fields = dict(found)
        AutoConfig.for_model(fields.pop("model_type"), **fields)  # the stock class accepts it


@settings(max_examples=60, deadline=None)
@given(shapes())
def test_every_shape_has_a_legal_skeleton_and_round_trips_in_our_own_form(shape: ModelShape):
    from transformers import AutoConfig

    base = configs.config_of(shape)
    skeleton = configs.skeleton_config(base, shape)
    AutoConfig.for_model(skeleton.pop("model_type"), **skeleton)
    assert configs.shape_of(configs.own_config(base, shape)) == shape
    stock = configs.stock_config(base, shape)
    assert stock is None or configs.shape_of(stock) == shape


def test_paper_shapes_that_llama_refuses_have_legal_skeletons():
    from shortllama import catalogue

    shape = catalogue.lookup("llama-7b/wanda-sp-20")
    fields = configs.config_of(shape)
    assert fields["hidden_size"] % fields["num_attention_heads"] == 0
    assert shape.blocks[10].query_heads == 26


@pytest.mark.parametrize(
    ("broken", "error", "says"),
    [
        ({"model_type": "xlstm"}, UnsupportedError, "model type 'xlstm' is not supported; supported: llama, mistral"),
        ({}, UnsupportedError, "model type None is not supported"),
        ({"model_type": "llama"}, InputError, "lacks 'num_attention_heads'"),
        (config("llama", vocab_size="many"), InputError, "sizes must be positive integers"),
        (config("llama", head_dim=None, num_attention_heads=0), InputError, "sizes must be positive integers"),
        (config("llama", quantization_config={"quant_method": "gptq"}), UnsupportedError, "quantized by 'gptq'"),
        (config("qwen2", layer_types=["full_attention"]), InputError, "layer_types has 1 entries"),
        ({"model_type": "shortllama"}, InputError, "lacks 'base'"),
        ({"model_type": "shortllama", "base": config("llama"), "blocks": []}, InputError, "0 entries in blocks"),
        (
            {"model_type": "shortllama", "base": config("llama"), "blocks": [{"query_heads": "x"}]},
            InputError,
            "blocks: Expected `int`",
        ),
    ],
)
def test_what_cannot_be_expressed_is_refused_by_name(broken: configs.Config, error: type[Exception], says: str):
    with pytest.raises(error, match=says) as caught:
        configs.shape_of(broken)
    assert "\n" not in str(caught.value)
