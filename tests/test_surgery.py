"""Pruned models against the masked dense model, in logits and tokens; the one path for meta and real weights."""

from __future__ import annotations

import copy
from typing import Any

import msgspec
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import keeps, plan_of, queries_in, shapes
from transformers import PreTrainedModel, StaticCache

from shortllama import catalogue, surgery, verification
from shortllama.errors import InputError, PlanError, UnsupportedError
from shortllama.families import adapter
from shortllama.plans import BlockKeep, Plan, Target, block_keep, compose, make_plan, shape_after
from shortllama.shape import BlockShape, ModelShape

PROMPT = torch.tensor([[3, 14, 15, 92, 65, 35], [8, 9, 79, 32, 38, 4]])

KEEPS = {
    "depth": (BlockKeep(0), BlockKeep(2), BlockKeep(3)),
    "depth-without-first": (BlockKeep(1), BlockKeep(3)),
    "uniform-width": tuple(BlockKeep(i, "0,2-3", "0-40,50-80") for i in range(4)),
    "per-layer-width": (BlockKeep(0), BlockKeep(1, "1", "3-9"), BlockKeep(2, "0-1,3"), BlockKeep(3, None, "0-90")),
    "no-attention-first": (BlockKeep(0, ""), BlockKeep(1), BlockKeep(2), BlockKeep(3)),
    "no-attention-middle": (BlockKeep(0), BlockKeep(1, ""), BlockKeep(2, "", "0-10"), BlockKeep(3)),
    "no-ffn": (BlockKeep(0, None, ""), BlockKeep(1), BlockKeep(3, "1-2", "")),
    "empty-block": (BlockKeep(0, "", ""), BlockKeep(1), BlockKeep(2, "", ""), BlockKeep(3)),
    "no-attention-at-all": (BlockKeep(0, ""), BlockKeep(2, "", "0-50")),
}
SHAPES = {
    "gqa": {},
    "mha-tied": {"kv_heads": 4, "query_heads": 4, "tied": True},
    "llama-biases": {"biases": ("q", "k", "v", "o", "gate", "up", "down")},
    "qwen2": {"family": "qwen2", "biases": ("q", "k", "v")},
    "qwen3": {"family": "qwen3", "qk_norm": True},
    "mistral": {"family": "mistral"},
}


def shape_like(**changes: Any) -> ModelShape:
    sizes = {"vocabulary": 97, "hidden": 64, "head_dim": 8, "blocks": 4, "query_heads": 8, "kv_heads": 4, "neurons": 96}
    return ModelShape.uniform(**{**sizes, **changes})


def built(shape: ModelShape, **options: Any) -> PreTrainedModel:
    """A model in float64 whose weights are large enough that greedy tokens differ."""
    return surgery.build(shape, dtype="float64", std=0.15, **options)


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.inference_mode():
        return model(PROMPT, use_cache=False).logits


def greedy(model: PreTrainedModel, steps: int, cache: str) -> list[list[int]]:
    """Tokens by a loop with a dynamic or static cache, or by recomputing everything ("none")."""
    static = StaticCache(config=model.config, max_cache_len=PROMPT.shape[1] + steps) if cache == "static" else None
    ids, given, kept = PROMPT, PROMPT, static
    for _ in range(steps):
        with torch.inference_mode():
            out = model(given, past_key_values=kept, use_cache=cache != "none")
        ids = torch.cat([ids, out.logits[:, -1:].argmax(-1)], dim=1)
        given, kept = (ids, None) if cache == "none" else (ids[:, -1:], out.past_key_values)
    return ids[:, PROMPT.shape[1] :].tolist()


# What only grouped attention has.
GROUPED = {
    "queries": tuple(BlockKeep(i, "0-1,3", None, "0,3,7") for i in range(4)),
    "queries-per-layer": (BlockKeep(0, None, "3-9", "1,2,5,6"), BlockKeep(1), BlockKeep(3, "0-1", "", "0,2")),
}


@pytest.mark.parametrize("attention", surgery.ATTENTIONS)
@pytest.mark.parametrize("base", SHAPES)
@pytest.mark.parametrize("keep", KEEPS)
def test_pruned_equals_masked_dense(keep: str, base: str, attention: str):
    shape = shape_like(**SHAPES[base])
    plan = plan_of(shape, KEEPS[keep])
    dense = built(shape, attention=attention)
    pruned = surgery.apply(plan, dense)
    before = logits(dense)
    expected = logits(verification.mask(dense, plan))
    assert (logits(pruned) - expected).abs().max() < 1e-6
    assert (before - expected).abs().max() > 1e-2  # the plan removes something that matters


@settings(max_examples=40, deadline=None)
@given(st.data(), st.sampled_from([name for name in SHAPES if name != "mha-tied"]))
def test_query_heads_gone_from_every_group_are_those_whose_columns_of_o_are_zero(data: st.DataObject, base: str):
    """The index mapping of grouped attention: what is left must read the KV heads that it read."""
    groups, size, head_dim = (data.draw(st.integers(*ends)) for ends in ((1, 3), (2, 4), (1, 3)))
    sizes = {"query_heads": groups * size, "kv_heads": groups, "head_dim": 2 * head_dim, "blocks": 2, "hidden": 24}
    shape = shape_like(**{**SHAPES[base], **sizes})
    stay = [data.draw(queries_in(tuple(range(groups)), size)) for _ in shape.blocks]
    keep = tuple(block_keep(i, shape.blocks[i], tuple(range(groups)), tuple(range(96)), stay[i]) for i in range(2))
    dense = built(shape)
    pruned = surgery.apply(plan_of(shape, keep), dense)
    assert surgery.shape_of(pruned) == shape_after(shape, keep)
    for index, block in enumerate(adapter(dense).blocks):
        columns = adapter(dense).projections(block)["o"].weight.data.view(24, groups * size, -1)
        columns[:, sorted(set(range(groups * size)) - set(stay[index]))] = 0
    assert (logits(pruned) - logits(dense)).abs().max() < 1e-6


@pytest.mark.parametrize("attention", surgery.ATTENTIONS)
@pytest.mark.parametrize("keep", [*KEEPS, *GROUPED])
def test_greedy_tokens_equal_with_every_cache(keep: str, attention: str):
    shape = shape_like()
    plan = plan_of(shape, {**KEEPS, **GROUPED}[keep])
    dense = built(shape, attention=attention, seed=1)
    pruned = surgery.apply(plan, dense)
    expected = greedy(verification.mask(dense, plan), 10, "dynamic")
    assert len({token for row in expected for token in row}) > 3
    for cache in ("none", "dynamic", "static"):
        assert greedy(pruned, 10, cache) == expected, cache


def test_generate_of_transformers_is_right_without_the_first_attention():
    shape = shape_like()
    plan = plan_of(shape, KEEPS["no-attention-first"])
    dense = built(shape, seed=1)
    pruned = surgery.apply(plan, dense)
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    ours = pruned.generate(PROMPT, **options)
    assert torch.equal(ours, verification.mask(dense, plan).generate(PROMPT, **options))
    assert ours[:, 6:].tolist() == greedy(pruned, 8, "none")


def test_cache_layers_are_contiguous_over_the_blocks_that_have_attention():
    shape = shape_like()
    pruned = surgery.apply(plan_of(shape, KEEPS["no-attention-middle"]), surgery.build(shape, device="meta"))
    parts = adapter(pruned)
    attentions = [parts.attention(block) for block in parts.blocks]
    assert [one.layer_idx for one in attentions if one is not None] == [0, 1]  # pyright: ignore
    assert attentions[1] is attentions[2] is None


def test_the_base_is_untouched_and_shares_no_memory():
    shape = shape_like(tied=True)
    base = built(shape)
    config, weights = copy.deepcopy(base.config.to_dict()), copy.deepcopy(base.state_dict())
    before = {parameter.data_ptr() for parameter in base.parameters()}
    pruned = surgery.apply(plan_of(shape, KEEPS["depth"]), base)
    with torch.no_grad():
        for parameter in pruned.parameters():
            parameter.zero_()
    pruned.config.update({"rms_norm_eps": 1.0})
    pruned.generation_config.update(max_length=7)
    assert base.config.to_dict() == config
    assert base.generation_config.max_length != 7
    assert all(torch.equal(tensor, weights[name]) for name, tensor in base.state_dict().items())
    assert not before & {parameter.data_ptr() for parameter in pruned.parameters()}
    assert pruned.get_output_embeddings().weight is pruned.get_input_embeddings().weight


@settings(max_examples=25, deadline=None)
@given(st.data(), shapes(max_blocks=4))
def test_meta_and_real_models_have_the_planned_shape(data: st.DataObject, shape: ModelShape):
    plan = plan_of(shape, data.draw(keeps(shape)))
    after = shape_after(shape, plan.keep)
    for device in ("meta", "cpu"):
        model = surgery.build(shape, device=device)
        assert surgery.shape_of(model) == shape
        assert sum(parameter.numel() for parameter in model.parameters()) == shape.parameters
        pruned = surgery.apply(plan, model)
        assert surgery.shape_of(pruned) == after
        assert sum(parameter.numel() for parameter in pruned.parameters()) == after.parameters
        assert {parameter.device.type for parameter in pruned.parameters()} == {device}
        assert pruned.config.num_hidden_layers == len(after.blocks)


@settings(max_examples=25, deadline=None)
@given(st.data(), shapes(max_blocks=4))
def test_a_composed_plan_equals_applying_twice(data: st.DataObject, shape: ModelShape):
    first = plan_of(shape, data.draw(keeps(shape)))
    between = shape_after(shape, first.keep)
    second = plan_of(between, data.draw(keeps(between)))
    base = surgery.build(shape)
    twice = surgery.apply(second, surgery.apply(first, base)).state_dict()
    once = surgery.apply(compose(first, second, shape), base).state_dict()
    assert twice.keys() == once.keys()
    assert all(torch.equal(twice[name], once[name]) for name in once)


def test_every_catalogue_shape_builds_with_its_parameters():
    for name in ("llama-7b/wanda-sp-20", "llama-7b/flap-27", "llama-13b/depth-32", "llama-3.2-1b", "qwen3-8b"):
        shape = catalogue.lookup(name)
        model = surgery.build(shape, device="meta", dtype="float16")
        assert sum(parameter.numel() for parameter in model.parameters()) == shape.parameters, name
        assert model.dtype == torch.float16


def test_random_weights_are_seeded_and_scaled():
    shape = shape_like(family="qwen2", biases=("q", "k", "v"))
    one, same, other = (surgery.build(shape, seed=seed, std=0.1).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(one[name], same[name]) for name in one)
    weight = "model.layers.1.mlp.up_proj.weight"
    assert not torch.equal(one[weight], other[weight])
    assert one[weight].std().item() == pytest.approx(0.1, rel=0.05)
    assert one["model.layers.1.self_attn.q_proj.bias"].abs().max() > 0
    assert all(tensor.eq(1).all() for name, tensor in one.items() if "norm" in name)


def test_rotary_frequencies_are_rebuilt_in_float32():
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = shape_like()
    base = LlamaForCausalLM(LlamaConfig(
        vocab_size=97, hidden_size=64, num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=4,
        intermediate_size=96, rope_parameters={"rope_type": "default", "rope_theta": 500.0},
    )).half()  # fmt: skip
    pruned = surgery.apply(plan_of(shape, KEEPS["depth"]), base)
    expected = 1 / 500 ** (torch.arange(0, 8, 2) / 8)
    found = adapter(pruned).rotary.get_buffer("inv_freq")
    assert found.dtype == torch.float32
    assert torch.allclose(found, expected)
    assert pruned.dtype == torch.float16


def test_per_layer_lists_follow_the_kept_blocks():
    shape = shape_like(family="qwen2", biases=("q", "k", "v"))
    base = surgery.build(shape)
    kinds = ["full_attention", "sliding_attention", "full_attention", "sliding_attention"]
    base.config.layer_types, base.config.sliding_window, base.config.use_sliding_window = kinds, 3, True
    pruned = surgery.apply(plan_of(shape, (BlockKeep(0), BlockKeep(1), BlockKeep(3))), base)
    assert pruned.config.layer_types == ["full_attention", "sliding_attention", "sliding_attention"]
    windows = [block.self_attn.sliding_window for block in adapter(pruned).blocks]
    assert windows == [None, 3, 3]
    with pytest.raises(UnsupportedError, match="cannot be removed alone"):
        surgery.apply(plan_of(shape, (BlockKeep(0, ""), BlockKeep(1), BlockKeep(2))), base)


def test_compensation_adds_biases_to_what_the_masked_model_computes():
    shape = shape_like()
    plan = msgspec.structs.replace(plan_of(shape, KEEPS["per-layer-width"]), compensation="flap")
    bias = torch.randn(64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    dense = built(shape)
    given_biases = {"model.layers.1.self_attn.o_proj.bias": bias, "model.layers.3.mlp.down_proj.bias": -bias}
    pruned = surgery.apply(plan, dense, compensation=given_biases)
    assert surgery.shape_of(pruned).biases == ("o", "down")
    plain = verification.mask(dense, msgspec.structs.replace(plan, compensation=None))
    for module, value in ((plain.model.layers[1].self_attn.o_proj, bias), (plain.model.layers[3].mlp.down_proj, -bias)):
        module.register_parameter("bias", torch.nn.Parameter(value))
    assert (logits(pruned) - logits(plain)).abs().max() < 1e-6


@pytest.mark.parametrize("compensation", [None, {"model.layers.9.mlp.down_proj.bias": torch.zeros(64)}])
def test_compensation_must_be_what_the_plan_names(compensation: Any):
    shape = shape_like()
    plan = msgspec.structs.replace(plan_of(shape, KEEPS["depth"]), compensation="flap")
    with pytest.raises(PlanError, match=r"compensation"):
        surgery.apply(plan, surgery.build(shape), compensation=compensation)


def blind(shape: ModelShape) -> Plan:
    return make_plan(
        model="m", shape=shape, method="depth", target=Target("shape", "depth:3"), keep=KEEPS["depth"], blind=True
    )


def test_a_blind_plan_is_for_random_weights_only():
    shape = shape_like()
    random = surgery.build(shape)
    once = surgery.apply(blind(shape), random)
    assert surgery.is_weightless(once)
    surgery.apply(blind(shape), surgery.build(shape, device="meta"))
    real = type(random)(random.config)
    with pytest.raises(PlanError, match=r"is blind .* random weights only") as caught:
        surgery.apply(blind(shape), real)
    assert "\n" not in str(caught.value)


def test_a_plan_for_another_base_is_refused():
    plan = plan_of(shape_like(neurons=95), (BlockKeep(0),))
    with pytest.raises(PlanError, match=r"plan is for m@\w+, this model is 4 blocks@\w+"):
        surgery.apply(plan, surgery.build(shape_like()))


def test_unknown_names_are_refused():
    with pytest.raises(InputError, match="attention 'flash' is unknown; choose one of sdpa, eager"):
        surgery.build(shape_like(), attention="flash")
    with pytest.raises(InputError, match="dtype 'int4' is unknown"):
        surgery.build(shape_like(), dtype="int4")


@pytest.mark.parametrize("device", ["cuda:99", "cuda:x", "tpu", "cuda:-1"])
def test_a_device_that_is_not_here_is_refused(device: str):
    with pytest.raises(UnsupportedError, match=rf"device '{device}' cannot be used: torch .* sees \d+ CUDA devices"):
        surgery.build(shape_like(), device=device)


def test_an_unknown_family_is_refused_by_name():
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaModel

    with pytest.raises(UnsupportedError, match="model type 'gpt2' is not supported; supported: llama"):
        surgery.shape_of(GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=1, vocab_size=9, n_positions=9)))
    small = LlamaConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
    with pytest.raises(UnsupportedError, match="LlamaModel has no lm_head; expected a causal language model"):
        surgery.shape_of(LlamaModel(small))


def test_a_pruned_model_can_be_trained():
    shape = shape_like()
    pruned = surgery.apply(plan_of(shape, KEEPS["empty-block"]), surgery.build(shape, std=0.1)).train()
    # Its name until transformers 5.2x was gradient_checkpointing_enable.
    enable = getattr(pruned, "activation_checkpointing_enable", None) or pruned.gradient_checkpointing_enable
    enable()
    loss = pruned(PROMPT, labels=PROMPT, use_cache=False).loss
    loss.backward()
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in pruned.parameters())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_surgery_on_a_gpu_stays_there_and_equals_the_mask():
    shape = shape_like()
    plan = plan_of(shape, KEEPS["per-layer-width"])
    dense = built(shape, device="cuda")
    pruned = surgery.apply(plan, dense)
    tensors = [*pruned.parameters(), *pruned.buffers()]
    assert {tensor.device.type for tensor in tensors} == {"cuda"}
    masked = verification.mask(dense, plan)
    with torch.inference_mode():
        ids = PROMPT.cuda()
        assert (pruned(ids).logits - masked(ids).logits).abs().max() < 1e-6


def test_mixed_group_sizes_build(tiny_shape: ModelShape):
    blocks = (BlockShape(8, 4, 10), BlockShape(6, 2, 96), BlockShape(3, 3, 5))
    shape = msgspec.structs.replace(tiny_shape, blocks=blocks)
    model = built(shape)
    assert surgery.shape_of(model) == shape
    assert greedy(model, 5, "static") == greedy(model, 5, "none") == greedy(model, 5, "dynamic")
