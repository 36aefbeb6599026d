from __future__ import annotations

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import shapes

from shortllama import files
from shortllama.catalogue import MODELS
from shortllama.errors import InputError
from shortllama.shape import BlockShape, ModelShape, item_bytes


def transformers_model(shape: ModelShape, device: str = "meta"):
    """The stock transformers model of a uniform shape: the independent account of parameters and FLOPs."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    block = shape.blocks[0]
    fields = {
        "vocab_size": shape.vocabulary,
        "hidden_size": shape.hidden,
        "head_dim": shape.head_dim,
        "num_hidden_layers": len(shape.blocks),
        "num_attention_heads": block.query_heads,
        "num_key_value_heads": block.kv_heads,
        "intermediate_size": block.neurons,
        "tie_word_embeddings": shape.tied,
        "pad_token_id": None,
    }
    if shape.family == "llama":
        fields |= {"attention_bias": "o" in shape.biases, "mlp_bias": "gate" in shape.biases}
    config = AutoConfig.for_model(shape.family, **fields)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, attn_implementation="eager")


def numel(shape: ModelShape) -> int:
    return sum(parameter.numel() for parameter in transformers_model(shape).parameters())


@st.composite
def buildable(draw: st.DrawFn) -> ModelShape:
    """Shapes that stock classes accept: Llama's checks that heads divide hidden; its biases are options."""
    shape = draw(shapes(uniform=True, max_blocks=3))
    if shape.family != "llama":
        return shape
    biases = draw(st.sampled_from([(), ("q", "k", "v", "o"), ("gate", "up", "down"), ("q", "k", "v", "o", "gate")]))
    biases = ("q", "k", "v", "o", "gate", "up", "down") if len(biases) == 5 else biases
    return msgspec.structs.replace(shape, hidden=shape.hidden * shape.blocks[0].query_heads, biases=biases)


@settings(max_examples=40)
@given(buildable())
def test_parameters_equal_those_of_the_built_model(shape: ModelShape) -> None:
    """MHA, GQA and MQA; tied and untied; Llama with and without biases, Mistral, Qwen2, Qwen3."""
    assert shape.parameters == numel(shape)


@pytest.mark.parametrize("name", ["llama-7b", "llama-3-8b", "llama-3.2-1b", "mistral-7b", "qwen2.5-7b", "qwen3-8b"])
def test_parameters_of_published_models_equal_those_of_the_built_model(name: str) -> None:
    assert MODELS[name].parameters == numel(MODELS[name])


@settings(max_examples=8)
@given(buildable(), st.integers(1, 3), st.integers(1, 6))
def test_flops_equal_those_counted_in_a_real_forward_pass(shape: ModelShape, batch: int, context: int) -> None:
    """Oracle: torch counts every matrix product of a prefill and of one decode step; rotary tables are no product
    of ours, and torch computes the masked half of a prefill's attention, which we do not count."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    shape = msgspec.structs.replace(shape, biases=shape.biases if shape.family == "qwen2" else ())
    model = transformers_model(shape, "cpu").eval()

    def count(tokens: int, cache):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            ids = torch.zeros(batch, tokens, dtype=torch.long)
            out = model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        rotary = sum(
            sum(flops.values()) for module, flops in counter.get_flop_counts().items() if module.endswith("rotary_emb")
        )
        return counter.get_total_flops() - rotary, out.past_key_values

    prefill, cache = count(context, None)
    decode, _ = count(1, cache)
    query_heads = sum(block.query_heads for block in shape.blocks)
    masked_half = 4 * shape.head_dim * query_heads * batch * (context * context - context * (context + 1) // 2)
    assert decode == shape.decode_flops(batch, context)
    assert prefill == shape.prefill_flops(batch, context) + masked_half


@settings(max_examples=8)
@given(buildable(), st.integers(1, 3), st.integers(1, 6))
def test_kv_bytes_equal_those_of_a_real_cache(shape: ModelShape, batch: int, context: int) -> None:
    import torch

    out = transformers_model(shape)(torch.zeros(batch, context, dtype=torch.long, device="meta"), use_cache=True)
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in out.past_key_values.layers)
    assert held == batch * context * shape.kv_bytes_per_token("float32")


def test_decode_bytes_by_hand() -> None:
    """LLaMA-7B in 16 bits: 13.2 GB without the embedding table, and 0.5 MiB of cache a token."""
    shape = MODELS["llama-7b"]
    assert shape.weight_bytes() == 2 * 6_738_415_616
    assert shape.kv_bytes_per_token() == 524_288
    assert shape.read_weight_bytes() == 2 * (6_738_415_616 - 32000 * 4096)
    assert shape.decode_bytes(4, 100) == shape.read_weight_bytes() + 4 * 101 * 524_288
    assert shape.prefill_bytes(4, 100) == shape.read_weight_bytes() + 4 * 100 * 524_288


def test_a_tied_table_is_read_as_the_output_head() -> None:
    shape = MODELS["llama-3.2-1b"]
    assert shape.read_weight_bytes() == shape.weight_bytes()
    untied = msgspec.structs.replace(shape, tied=False)
    assert untied.parameters - shape.parameters == 128256 * 2048
    assert untied.decode_flops(1, 1) == shape.decode_flops(1, 1)


@given(shapes(min_blocks=2))
def test_removed_modules_cost_nothing(shape: ModelShape) -> None:
    first, *rest = shape.blocks
    without_attention = msgspec.structs.replace(shape, blocks=(BlockShape(0, 0, first.neurons), *rest))
    without_mlp = msgspec.structs.replace(shape, blocks=(BlockShape(first.query_heads, first.kv_heads, 0), *rest))
    without_both = msgspec.structs.replace(shape, blocks=tuple(rest))
    assert shape.parameters - without_attention.parameters == shape.attention_parameters(first)
    assert shape.parameters - without_mlp.parameters == shape.mlp_parameters(first)
    assert shape.parameters - without_both.parameters == shape.block_parameters(first)
    assert without_mlp.kv_bytes_per_token() == shape.kv_bytes_per_token()
    assert without_attention.kv_bytes_per_token() == without_both.kv_bytes_per_token()


@given(shapes())
def test_a_shape_survives_json_and_has_one_digest(shape: ModelShape) -> None:
    read = files.decode_json(files.encode_json(shape), ModelShape, "shape")
    assert read == shape
    assert read.digest() == shape.digest()
    assert msgspec.structs.replace(shape, hidden=shape.hidden + 1).digest() != shape.digest()


def test_alignments() -> None:
    shape = ModelShape.uniform(
        vocabulary=32000, hidden=4096, head_dim=128, blocks=2, query_heads=26, kv_heads=26, neurons=8807
    )
    mixed = msgspec.structs.replace(shape, blocks=(shape.blocks[0], BlockShape(0, 0, 8256)))
    assert mixed.alignments() == {
        "vocabulary": (256,),
        "hidden": (4096,),
        "head_dim": (128,),
        "query_width": (256,),
        "kv_width": (256,),
        "neurons": (64, 1),
    }
    assert shape.is_uniform
    assert not mixed.is_uniform


@pytest.mark.parametrize(
    ("sizes", "problem"),
    [((-1, 1, 1), "negative"), ((2, 0, 1), "together"), ((3, 2, 1), "multiple of KV heads")],
)
def test_impossible_blocks_are_refused(sizes: tuple[int, int, int], problem: str) -> None:
    with pytest.raises(InputError, match=problem):
        BlockShape(*sizes)


def test_impossible_models_are_refused() -> None:
    good = MODELS["llama-7b"]
    with pytest.raises(InputError, match="'z'"):
        msgspec.structs.replace(good, biases=("q", "z"))
    with pytest.raises(InputError, match="at least 1"):
        msgspec.structs.replace(good, hidden=0)
    with pytest.raises(InputError, match=r"'float8'.*float16"):
        item_bytes("float8")
