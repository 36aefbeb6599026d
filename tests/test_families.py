"""Every family with a tiny random model: built, scored, planned, pruned, saved, loaded, generated, as stock does it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from family_cases import CASES, HEADS, SIZES, Case, stock_model
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import plan_of
from transformers import AutoConfig, AutoModelForCausalLM

from shortllama import (
    api,
    calibration,
    checkpoint,
    configs,
    families,
    layout,
    planning,
    sampling,
    scoring,
    sources,
    surgery,
    verification,
)
from shortllama.errors import InputError, PlanError, ShortllamaError, UnsupportedError
from shortllama.plans import BlockKeep, Plan, Target, shape_after
from shortllama.variants import Variant

CRITERIA = ("ppl", "bi", "random", "last")
IDS = np.random.default_rng(0).integers(3, 97, size=(3, 12))


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


@pytest.fixture
def folder(case: Case, tmp_path: Path) -> Path:
    stock_model(case).save_pretrained(tmp_path / "dense")
    return tmp_path / "dense"


def logits(model: Any, ids: Any = IDS) -> torch.Tensor:
    with torch.inference_mode():
        return model(input_ids=torch.as_tensor(ids), use_cache=False).logits


def tokens(model: Any) -> list[int]:
    """Greedy tokens through the stock generate, with its cache where that is right."""
    ids = torch.as_tensor(IDS[:1])
    made = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=8,
        do_sample=False,
        eos_token_id=None,
        use_cache=families.lookup(model.config.model_type).cache is not None,
    )
    return made[0, ids.shape[1] :].tolist()


def uncached_tokens(model: Any) -> list[int]:
    ids = torch.as_tensor(IDS[:1])
    for _ in range(8):
        with torch.inference_mode():
            ids = torch.cat([ids, model(input_ids=ids, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    return ids[0, IDS.shape[1] :].tolist()


def calibrated() -> calibration.Calibration:
    return calibration.Calibration(tuple(IDS), {"source": "test", "digest": "0"})


# -- shapes -----------------------------------------------------------------------------------------------------------


def test_the_shape_has_every_parameter_of_the_stock_model_by_name(case: Case):
    with torch.device("meta"):
        fields = case.config()
        stock = AutoModelForCausalLM.from_config(AutoConfig.for_model(fields.pop("model_type"), **fields))
    shape = configs.shape_of(case.config())
    assert layout.tensors(shape) == {name: tuple(one.shape) for name, one in stock.named_parameters()}
    assert shape.parameters == sum(one.numel() for one in stock.parameters())
    assert surgery.shape_of(stock) == shape
    assert configs.shape_of(json.loads(stock.config.to_json_string())) == shape


def test_random_weights_of_a_shape_are_a_model_of_that_shape(case: Case):
    shape = configs.shape_of(case.config())
    model = surgery.build(shape, std=0.15)
    assert surgery.shape_of(model) == shape
    assert torch.isfinite(logits(model)).all()
    assert surgery.shape_of(surgery.build(shape, device="meta")) == shape


def test_matrices_decide_the_flops(case: Case):
    shape = configs.shape_of(case.config())
    matrices = sum(
        int(np.prod(sizes))
        for name, sizes in layout.tensors(shape).items()
        if len(sizes) > 1 and name.startswith(families.lookup(case.model_type).blocks)
    )
    heads = sum(block.query_heads for block in shape.blocks)
    expected = 2 * (matrices + shape.vocabulary * shape.hidden) + 4 * shape.head_dim * heads
    assert shape.decode_flops(1, 0) == expected


@settings(max_examples=40)
@given(st.data())
def test_any_stack_has_the_parameters_of_the_stock_model_and_can_be_built(data: st.DataObject):
    """The closed form of blocks that go whole only, and its inverse, against the stock classes."""
    family = data.draw(st.sampled_from(["gpt_neox", "mamba", "falcon_mamba", "mamba2", "rwkv"]))
    number, flag = st.integers(1, 5), st.booleans()
    fields = {
        "vocab_size": 11,
        "hidden_size": 4 * data.draw(number),
        "num_hidden_layers": data.draw(number),
        "pad_token_id": 0,
    }
    fields |= {"tie_word_embeddings": data.draw(flag)}
    if family == "gpt_neox":
        fields |= {"num_attention_heads": 2, "intermediate_size": data.draw(number), "attention_bias": data.draw(flag)}
    elif family == "rwkv":
        fields |= {"attention_hidden_size": data.draw(st.none() | number)}
        fields |= {"intermediate_size": data.draw(st.none() | number)}
    else:
        fields |= {"state_size": data.draw(number), "conv_kernel": data.draw(number), "expand": 2}
        fields |= {"use_bias": data.draw(flag), "use_conv_bias": data.draw(flag)}
    if family == "mamba2":
        fields |= {
            "num_heads": 4,
            "head_dim": fields["hidden_size"] // 2,
            "n_groups": data.draw(st.sampled_from([1, 2, 4])),
        }
    with torch.device("meta"):
        stock = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **fields))
    shape = configs.shape_of({"model_type": family, **fields})
    assert layout.tensors(shape) == {name: tuple(one.shape) for name, one in stock.named_parameters()}
    assert shape.parameters == sum(one.numel() for one in stock.parameters())
    assert configs.shape_of(configs.config_of(shape)) == shape
    assert surgery.shape_of(surgery.build(shape, device="meta")) == shape


# -- loading ----------------------------------------------------------------------------------------------------------


def test_our_loader_computes_what_stock_transformers_does(case: Case, folder: Path):
    ours, _ = checkpoint.load(folder)
    stock = AutoModelForCausalLM.from_pretrained(folder, attn_implementation=ours.config._attn_implementation)
    assert type(ours) is type(stock)
    difference = (logits(ours) - logits(stock)).abs().max()
    assert difference == 0 or (case.model_type == "rwkv" and difference < case.tolerance)
    assert tokens(ours) == tokens(stock) == uncached_tokens(stock)
    assert len(set(tokens(ours))) > 1


# -- the whole way ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("criterion", CRITERIA)
def test_blocks_are_scored_planned_pruned_written_and_loaded(case: Case, folder: Path, tmp_path: Path, criterion: str):
    dense, _ = checkpoint.load(folder)
    scores = scoring.score(dense, criterion, calibrated())
    assert scores.blocks is not None
    assert len(scores.blocks) == 4
    plan = api.plan(dense, method=criterion, blocks=1, scores=scores)
    gone = int(np.argmin(scores.blocks))
    assert [keep.index for keep in plan.keep] == [index for index in range(4) if index != gone]
    pruned = surgery.apply(plan, dense)
    checkpoint.write(folder, plan, tmp_path / "pruned")
    again, _ = checkpoint.load(tmp_path / "pruned")
    assert torch.equal(logits(again), logits(pruned))
    kind = again.config._attn_implementation
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "pruned", attn_implementation=kind)
    assert (logits(stock) - logits(pruned)).abs().max() < case.tolerance
    assert tokens(stock) == tokens(again) == uncached_tokens(again)
    if criterion == "ppl":  # what the score says is what the pruned model does
        losses = torch.nn.functional.cross_entropy(
            logits(pruned)[:, :-1].flatten(0, 1), torch.as_tensor(IDS)[:, 1:].flatten()
        )
        assert scores.blocks[gone] == pytest.approx(float(losses.exp()), rel=1e-4)


def test_the_masked_dense_model_is_the_pruned_one(case: Case, folder: Path, tmp_path: Path):
    dense, _ = checkpoint.load(folder)
    keeps = [(BlockKeep(0), BlockKeep(2), BlockKeep(3))]
    if case.widths:
        keeps.append(tuple(BlockKeep(i, "0,2-3", "0-20,30-40") for i in range(4)))
        keeps.append((BlockKeep(0, None, "3-9"), BlockKeep(1, None, ""), BlockKeep(3)))
        keeps.append(tuple(BlockKeep(i, None, "0-30", "0,3,5-6") for i in range(4)))
        keeps.append(tuple(BlockKeep(i, "1,3", None, f"{2 + i % 2},6") for i in range(4)))
    for keep in keeps:
        plan = plan_of(surgery.shape_of(dense), keep)
        pruned = surgery.apply(plan, dense)
        masked = verification.mask(checkpoint.load(folder)[0], plan)
        difference = (logits(pruned) - logits(masked)).abs().max() / logits(masked).abs().max()
        assert difference < 1e-5, keep
        checkpoint.write(folder, plan, tmp_path / f"pruned {keeps.index(keep)}")
        again, _ = checkpoint.load(tmp_path / f"pruned {keeps.index(keep)}")
        assert torch.equal(logits(again), logits(pruned))
        assert surgery.shape_of(again) == shape_after(surgery.shape_of(dense), keep)
        assert tokens(again) == uncached_tokens(again)


@pytest.mark.parametrize("name", ["mamba", "gpt_neox", "gemma3", "rwkv"])
def test_verification_knows_the_families(name: str, tmp_path: Path):
    stock_model(CASES[name]).save_pretrained(tmp_path / "dense")
    plan = plan_of(sources.from_folder("m", tmp_path / "dense").shape, (BlockKeep(0), BlockKeep(3)))
    checkpoint.write(tmp_path / "dense", plan, tmp_path / "pruned")
    report = verification.verify(tmp_path / "pruned", tmp_path / "dense")
    assert report.ok, report.failures
    assert report.loaded_as == type(stock_model(CASES[name])).__name__
    assert {fit.engine: fit.can for fit in report.engines}["transformers"]


@pytest.mark.parametrize("criterion", ["ppl", "kl"])
def test_the_norm_of_rwkvs_embeddings_outlives_its_first_block(tmp_path: Path, criterion: str):
    """What a criterion says of each block is what the model without it does, block 0 included."""
    stock_model(CASES["rwkv"]).save_pretrained(tmp_path / "dense")
    dense, _ = checkpoint.load(tmp_path / "dense")
    before = {name: one.clone() for name, one in dense.state_dict().items()}
    scores = scoring.score(dense, criterion, calibrated())
    assert scores.blocks is not None
    after = dense.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(one, after[name]) for name, one in before.items())
    base = torch.log_softmax(logits(dense), -1)
    assert not dense.rwkv.embeddings._forward_hooks
    for gone in range(4):
        plan = plan_of(surgery.shape_of(dense), tuple(BlockKeep(i) for i in range(4) if i != gone))
        pruned = surgery.apply(plan, dense)
        assert torch.equal(pruned.rwkv.blocks[0].pre_ln.weight, before["rwkv.blocks.0.pre_ln.weight"])
        found = torch.log_softmax(logits(pruned), -1)
        if criterion == "ppl":
            expected = torch.nn.functional.nll_loss(found[:, :-1].flatten(0, 1), torch.as_tensor(IDS)[:, 1:].flatten())
            assert scores.blocks[gone] == pytest.approx(float(expected.exp()), rel=1e-4)
        else:
            divergence = (base.exp() * (base - found)).sum(-1)
            assert scores.blocks[gone] == pytest.approx(float(divergence.mean()), rel=1e-3)


@pytest.mark.parametrize("criterion", ["ppl", "bi", "angular", "relative-magnitude", "norm", "kl"])
@pytest.mark.parametrize("name", ["rwkv", "mamba", "gpt_neox"])
def test_forward_criteria_choose_in_any_stack(name: str, criterion: str):
    shape = configs.shape_of(CASES[name].config())
    model = surgery.build(shape, std=0.2)
    plan = api.plan(model, method=criterion, blocks=2, calibration=calibrated())
    assert len(plan.keep) == 2
    assert torch.isfinite(logits(surgery.apply(plan, model))).all()


def test_iterative_removal_in_a_stack_is_what_removal_does(tmp_path: Path):
    stock_model(CASES["rwkv"]).save_pretrained(tmp_path / "dense")
    dense, _ = checkpoint.load(tmp_path / "dense")
    plan = api.plan(dense, method="ppl", blocks=2, iterative=True, calibration=calibrated())
    left = list(range(4))
    for _ in range(2):
        losses = {}
        for gone in left:
            keep = tuple(BlockKeep(i) for i in left if i != gone)
            found = logits(surgery.apply(plan_of(surgery.shape_of(dense), keep), dense))
            losses[gone] = float(
                torch.nn.functional.cross_entropy(found[:, :-1].flatten(0, 1), torch.as_tensor(IDS)[:, 1:].flatten())
            )
        left.remove(min(losses, key=lambda index: losses[index]))
    assert [keep.index for keep in plan.keep] == left


def test_a_forward_that_rescales_weights_is_refused_in_memory_and_switched_off_in_ours(tmp_path: Path):
    stock = stock_model(CASES["rwkv"])
    stock.save_pretrained(tmp_path / "dense")
    written = {name: one.clone() for name, one in stock.state_dict().items()}
    with pytest.raises(UnsupportedError, match=r"rescale_every of this rwkv model is 2: .* shortllama.load"):
        scoring.score(stock, "bi", calibrated())
    plan = plan_of(surgery.shape_of(stock), (BlockKeep(0), BlockKeep(3)))
    with pytest.raises(UnsupportedError, match="rescale_every"):
        surgery.apply(plan, stock)
    ours, _ = checkpoint.load(tmp_path / "dense")
    logits(ours)
    assert all(torch.equal(one, written[name]) for name, one in ours.state_dict().items())
    logits(stock)
    assert not all(torch.equal(one, written[name]) for name, one in stock.state_dict().items())
    checkpoint.write(tmp_path / "dense", plan, tmp_path / "pruned")
    assert json.loads((tmp_path / "pruned" / "config.json").read_text())["rescale_every"] == 2


@pytest.mark.parametrize("name", ["rwkv", "mamba", "falcon_mamba", "mamba2", "gpt_neox", "gemma2"])
def test_text_is_sampled_as_without_a_cache(name: str):
    model = stock_model(CASES[name])
    prompt = np.full((2, 1), 1)
    drawn = sampling.sample(model, prompt, 7, seed=3)
    with torch.inference_mode():
        for row, ids in enumerate(drawn):
            random = np.random.default_rng((3, row)).random(7)
            for step in range(7):
                output = model(input_ids=torch.as_tensor(ids[None, : step + 1]), use_cache=False)
                expected = sampling.draw(output.logits[:, -1], torch.tensor([random[step]]), 1.0)
                assert int(expected) == ids[step + 1], (row, step)


# -- what is not understood -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [name for name, one in CASES.items() if not one.widths], indirect=True)
def test_blocks_that_go_whole_only_are_never_cut(case: Case, folder: Path):
    assert not case.widths
    dense, _ = checkpoint.load(folder)
    shape = surgery.shape_of(dense)
    for keep in (BlockKeep(0, ""), BlockKeep(0, None, "")):
        with pytest.raises(PlanError, match="only be removed whole"):
            shape_after(shape, (keep,))
    for method in ("wanda-sp", "mag-sp"):
        with pytest.raises(ShortllamaError) as caught:
            api.plan(dense, method=method, ratio=0.2, calibration=calibrated())
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"model_type": "gemma3n"}, "share KV caches"),
        ({"model_type": "gemma3"}, "gemma3_text"),
        ({"model_type": "mixtral", "num_local_experts": 8}, "num_local_experts is 8; mixtures of experts"),
        ({"model_type": "qwen3_moe", "num_experts": 128}, "num_experts is 128"),
        ({"model_type": "llama", **SIZES, **HEADS, "num_kv_shared_layers": 2}, "num_kv_shared_layers is 2"),
        ({"model_type": "bert"}, "'bert' is not supported; supported: llama, mistral"),
    ],
)
def test_what_is_not_understood_is_refused_with_the_reason(config: dict[str, Any], says: str):
    with pytest.raises(UnsupportedError, match=says) as caught:
        configs.shape_of(config)
    assert "\n" not in str(caught.value)


def test_phi3_has_one_number_of_heads(tmp_path: Path):
    stock_model(CASES["phi3"]).save_pretrained(tmp_path / "dense")
    shape = sources.from_folder("m", tmp_path / "dense").shape
    plan: Plan = plan_of(shape, (BlockKeep(0), BlockKeep(1, "0-1")))
    with pytest.raises(
        UnsupportedError, match="one number of heads for all blocks from its config, this plan leaves 4, 8"
    ):
        checkpoint.write(tmp_path / "dense", plan, tmp_path / "out")
    with pytest.raises(UnsupportedError, match="one number of heads"):
        surgery.apply(plan, checkpoint.load(tmp_path / "dense")[0])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("method", "how", "refused"),
    [
        ("wanda-sp", {"protect": (1, 1)}, True),
        ("wanda-sp", {}, False),
        ("llm-pruner", {"protect": (1, 1)}, True),
        ("llm-pruner", {"protect": (0, 0)}, False),
        ("flap", {"variant": Variant(structure="UL-UM")}, False),
    ],
)
def test_heads_that_phi3_cannot_have_are_refused_with_the_plan(method: str, how: dict[str, Any], refused: bool):
    """And, where the shape is known beforehand, before anything is scored."""
    shape = configs.shape_of(CASES["phi3"].config())
    target = Target("ratio", 0.3)
    if refused:
        says = "leaves 6, 8; keep as many heads in every block"
        with pytest.raises(UnsupportedError, match=says):
            planning.outlook(method, shape=shape, target=target, **how)
        with pytest.raises(UnsupportedError, match=says):
            planning.make_plan_for(method, model="m", shape=shape, target=target, **how)
        return
    planning.outlook(method, shape=shape, target=target, **how)
    model = surgery.build(shape, std=0.2)
    plan = api.plan(model, method=method, ratio=0.3, calibration=calibrated(), **how)
    (heads,) = {block.query_heads for block in shape_after(shape, plan.keep).blocks}
    assert heads < 8


def test_widths_that_flap_allots_apart_are_refused_where_phi3_cannot_have_them():
    model = surgery.build(configs.shape_of(CASES["phi3"].config()), std=0.2)
    model.model.layers[1].self_attn.o_proj.weight.data *= 9
    with pytest.raises(UnsupportedError, match="one number of heads for all blocks"):
        api.plan(model, method="flap", ratio=0.3, calibration=calibrated())


def test_old_files_of_gpt_neox_are_read(tmp_path: Path):
    """Their head is embed_out, and they hold causal masks."""
    from safetensors.torch import load_file, save_file

    model = stock_model(CASES["gpt_neox"])
    model.save_pretrained(tmp_path / "dense")
    file = tmp_path / "dense" / "model.safetensors"
    tensors = load_file(file)
    head = tensors.pop("embed_out.weight" if "embed_out.weight" in tensors else "lm_head.weight")
    extra = {
        "gpt_neox.layers.0.attention.bias": torch.ones(1, 1, 4, 4),
        "gpt_neox.layers.0.attention.masked_bias": torch.ones(1),
    }
    save_file({**tensors, **extra, "embed_out.weight": head}, file, metadata={"format": "pt"})
    assert torch.equal(logits(checkpoint.load(tmp_path / "dense")[0]), logits(model))


def test_a_model_without_the_right_fields_is_named(case: Case):
    config = case.config()
    del config["num_hidden_layers"]
    with pytest.raises(InputError, match=f"{case.model_type} model lacks 'num_hidden_layers'"):
        configs.shape_of(config)


def test_digests_of_shapes_from_before_the_mixers_stay(tiny_shape: Any):
    assert msgspec.structs.replace(tiny_shape, mixer=()).digest() == tiny_shape.digest() == "95b597d883ac167d"
