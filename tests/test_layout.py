"""The list of tensors against the stock models and the closed form; slices against plain indexing."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import keeps, shapes

from shortllama import layout
from shortllama.plans import BlockKeep, shape_after
from shortllama.shape import ModelShape


@settings(max_examples=80, deadline=None)
@given(shapes())
def test_tensors_add_up_to_the_closed_form(shape: ModelShape):
    assert sum(map(math.prod, layout.tensors(shape).values())) == shape.parameters


@settings(max_examples=80, deadline=None)
@given(st.data(), shapes())
def test_slices_give_the_tensors_of_the_pruned_shape(data: st.DataObject, shape: ModelShape):
    keep = data.draw(keeps(shape))
    base, after = layout.tensors(shape), layout.tensors(shape_after(shape, keep))
    found = layout.slices(shape, keep)
    assert found.keys() == after.keys()
    for name, one in found.items():
        size = list(base[one.source])
        for axis, kept in ((0, one.rows), (1, one.columns)):
            if kept is not None:
                assert list(kept) == sorted(set(kept))
                size[axis] = len(kept)
        assert tuple(size) == after[name]


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_names_and_dimensions_are_those_of_transformers(family: str):
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from shortllama import configs

    fields = {"vocab_size": 50, "hidden_size": 48, "intermediate_size": 20, "num_hidden_layers": 2, "head_dim": 8}
    made = AutoConfig.for_model(family, **fields, num_attention_heads=6, num_key_value_heads=3)
    with torch.device("meta"):
        stock = AutoModelForCausalLM.from_config(made)
    found = {name: tuple(parameter.shape) for name, parameter in stock.named_parameters()}
    assert layout.tensors(configs.shape_of(made.to_dict())) == found


def test_a_kv_group_takes_its_query_heads_along(tiny_shape: ModelShape):
    found = layout.slices(tiny_shape, (BlockKeep(2, "1,3", "5-7"),))
    q, k = found["model.layers.0.self_attn.q_proj.weight"], found["model.layers.0.self_attn.k_proj.weight"]
    o, down = found["model.layers.0.self_attn.o_proj.weight"], found["model.layers.0.mlp.down_proj.weight"]
    # 8 query heads of 8 in 4 groups: group 1 is rows 16-31, group 3 rows 48-63.
    assert q == ("model.layers.2.self_attn.q_proj.weight", (*range(16, 32), *range(48, 64)), None)
    assert k.rows == (*range(8, 16), *range(24, 32))
    assert (o.rows, o.columns) == (None, q.rows)
    assert (down.rows, down.columns) == (None, (5, 6, 7))


def test_query_heads_go_from_inside_their_groups(tiny_shape: ModelShape):
    found = layout.slices(tiny_shape, (BlockKeep(2, "1,3", None, "3,6"),))
    q, k = found["model.layers.0.self_attn.q_proj.weight"], found["model.layers.0.self_attn.k_proj.weight"]
    assert q.rows == (*range(24, 32), *range(48, 56))
    assert found["model.layers.0.self_attn.o_proj.weight"].columns == q.rows
    assert k.rows == (*range(8, 16), *range(24, 32))
    found = layout.slices(tiny_shape, (BlockKeep(2, None, None, "0,2,4,7"),))
    assert found["model.layers.0.self_attn.k_proj.weight"].rows is None
    assert found["model.layers.0.self_attn.q_proj.weight"].rows == (
        *range(8), *range(16, 24), *range(32, 40), *range(56, 64)
    )  # fmt: skip


def test_fused_projections_lose_query_heads_and_keep_their_keys(tiny_shape: ModelShape):
    import msgspec

    fused = msgspec.structs.replace(tiny_shape, family="phi3")
    found = layout.slices(fused, (BlockKeep(0, None, None, "1,2,4,7"),))
    rows = found["model.layers.0.self_attn.qkv_proj.weight"].rows
    assert rows == (
        *range(8, 24), *range(32, 40), *range(56, 64), *range(64, 128)
    )  # fmt: skip
