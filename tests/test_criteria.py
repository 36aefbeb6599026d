"""Criteria against independent computations: rebuilt models, autograd, finite differences, loops over heads."""

from __future__ import annotations

import gc
import math

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRMSNorm

from shortllama import calibration, configs, criteria, methods, scoring, selection, surgery
from shortllama.criteria import angular, memory, removal, weights
from shortllama.errors import InputError, UnsupportedError
from shortllama.families import adapter
from shortllama.planning import make_plan_for
from shortllama.plans import BlockKeep, Target, block_keep, make_plan
from shortllama.shape import ModelShape
from shortllama.stack import Stack, token_nll
from shortllama.variants import Variant
from tests.strategies import plan_of

REDUNDANT = [1, 3, 5, 6, 8, 9, 11]
FAMILIES = {
    "llama": {},
    "mistral": {},
    "qwen2": {"biases": ("q", "k", "v")},
    "qwen3": {"qk_norm": True},
}


def small(family: str = "llama", blocks: int = 4, **changes) -> ModelShape:
    sizes = {"vocabulary": 41, "hidden": 24, "head_dim": 6, "query_heads": 6, "kv_heads": 3, "neurons": 20}
    return ModelShape.uniform(family=family, blocks=blocks, **FAMILIES[family], **{**sizes, **changes})


def build(family: str = "llama", blocks: int = 4, dtype: str = "float64", **changes):
    model = surgery.build(small(family, blocks, **changes), dtype=dtype, std=0.2, seed=1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():  # norms of one would hide a criterion that forgets them
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.mul_(1 + 0.3 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype))
    return model


def tokens(rows: int = 5, length: int = 9, seed: int = 0) -> calibration.Calibration:
    ids = np.random.default_rng(seed).integers(0, 41, size=(rows, length))
    return calibration.describe(ids, "made", seed=None, bos=None)


def mean_nll(model, used: calibration.Calibration) -> float:
    """The mean over all predicted tokens, one sequence at a time, by hand."""
    total, count = 0.0, 0
    for sequence in used.sequences:
        with torch.no_grad():
            logits = model(input_ids=torch.from_numpy(sequence)[None], use_cache=False).logits[0]
        logs = torch.log_softmax(logits.double(), dim=-1)
        for position in range(len(sequence) - 1):
            total -= logs[position, sequence[position + 1]].item()
            count += 1
    return total / count


def few_rows(monkeypatch, rows: int) -> None:
    monkeypatch.setattr(calibration, "rows_within", lambda length, vocabulary: rows)
    # Blocks as small as these would be differentiated sequence by sequence.
    monkeypatch.setattr(memory, "rows_backward", lambda shape, length, dtype: rows)


# -- the registry -----------------------------------------------------------------------------------------------------


def test_every_criterion_has_its_four_names_and_every_method_its_criterion():
    for name in criteria.CRITERIA:
        found = criteria.lookup(name)
        assert name == found.NAME
        assert found.UNITS in (("block",), ("block", "module"), ("width",))
        assert found.NEEDS in ("nothing", "weights", "calibration")
    for method in methods.METHODS.values():
        found = criteria.lookup(method.criterion)
        assert found.UNITS[0] == method.unit
        assert ("module" in found.UNITS) == method.modules


def test_an_unknown_criterion_names_near_ones():
    with pytest.raises(InputError, match="criterion 'tailor' is unknown; did you mean taylor"):
        criteria.lookup("tailor")
    with pytest.raises(InputError, match="choose one of ppl, kl, taylor"):
        criteria.lookup("zzz")


# -- the stack --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_resuming_anywhere_gives_the_model_s_own_logits(family):
    model = build(family)
    stack = Stack(model, list(adapter(model).blocks))
    ids = torch.from_numpy(np.stack(tokens().sequences))
    with torch.no_grad():
        expected = model(input_ids=ids, use_cache=False).logits
        states, logits = stack.trace(ids)
        assert torch.equal(logits, expected)
        assert len(states) == len(stack) + 1
        for at in range(len(stack) + 1):
            assert torch.equal(stack.resume(ids, states[at] if at else None, at=at), expected)
        for at in range(len(stack)):
            assert torch.equal(stack.advance(ids, states[at] if at else None, at=at), states[at + 1])


def test_a_failing_pass_leaves_no_trace_in_the_model():
    model = build()
    stack = Stack(model, list(adapter(model).blocks))
    ids = torch.tensor([[1, 2]])
    with pytest.raises(RuntimeError):
        stack.advance(ids, torch.zeros(1, 2, 7, dtype=torch.float64), at=2)
    for block in stack.blocks:
        assert "forward" not in vars(block)
        assert not block._forward_hooks
        assert not block._forward_pre_hooks


# -- ppl --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_ppl_equals_physically_rebuilt_models(family):
    model, used = build(family), tokens()
    shape = surgery.shape_of(model)
    scores = scoring.score(model, "ppl", used)
    assert scores.blocks is not None
    assert scores.details is not None
    assert scores.details["dense"] == pytest.approx(math.exp(mean_nll(model, used)), rel=1e-12)
    for gone in range(4):
        keep = tuple(BlockKeep(index) for index in range(4) if index != gone)
        rebuilt = surgery.apply(plan_of(shape, keep), model)
        assert scores.blocks[gone] == pytest.approx(math.exp(mean_nll(rebuilt, used)), rel=1e-12)


def test_ppl_respects_sliding_windows_of_the_blocks_that_have_them():
    kinds = ["full_attention", "sliding_attention", "full_attention", "sliding_attention"]
    config = AutoConfig.for_model(
        **{**configs.config_of(small("qwen2")), "use_sliding_window": True, "sliding_window": 3, "layer_types": kinds}
    )
    model = AutoModelForCausalLM.from_config(config).double().eval()
    with torch.no_grad():
        for name, parameter in build("qwen2").named_parameters():
            model.get_parameter(name).copy_(parameter)
    rebuilt = surgery.apply(plan_of(surgery.shape_of(model), tuple(BlockKeep(i) for i in (0, 1, 3))), model)
    assert rebuilt.config.layer_types == ["full_attention", "sliding_attention", "sliding_attention"]
    scores = scoring.score(model, "ppl", tokens())
    assert scores.blocks is not None
    assert scores.blocks[2] == pytest.approx(math.exp(mean_nll(rebuilt, tokens())), rel=1e-12)


@pytest.fixture
def passes(monkeypatch) -> list[int]:
    """Grows by one with each Llama block that is computed."""
    counted: list[int] = []
    forward = LlamaDecoderLayer.forward
    monkeypatch.setattr(
        LlamaDecoderLayer, "forward", lambda self, *args, **kwargs: counted.append(1) or forward(self, *args, **kwargs)
    )
    return counted


@pytest.mark.parametrize("name", ["ppl", "kl"])
@pytest.mark.parametrize("blocks", [1, 2, 5])
def test_leaving_out_runs_exactly_the_blocks_it_must(blocks, name, passes):
    model = build(blocks=blocks)
    task = criteria.Task(adapter(model), surgery.shape_of(model), tokens(), 0, None, lambda done, total: None)
    criteria.lookup(name).score(task)
    assert len(passes) == blocks * (blocks - 1) // 2 + blocks


@pytest.mark.parametrize("name", ["bi", "angular", "relative-magnitude", "norm"])
def test_traced_criteria_cost_one_pass_without_the_output_head(name, passes, monkeypatch):
    model = build()
    monkeypatch.setattr(model.lm_head, "forward", lambda _: pytest.fail("the output head ran"))
    scoring.score(model, name, tokens())
    assert len(passes) == 4


# -- kl ---------------------------------------------------------------------------------------------------------------


def log_probabilities(model, sequence) -> np.ndarray:
    with torch.no_grad():
        logits = model(input_ids=torch.from_numpy(sequence)[None], use_cache=False).logits[0].numpy()
    shifted = logits - logits.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))


@pytest.mark.parametrize("family", FAMILIES)
def test_kl_equals_physically_rebuilt_models_position_by_position(family, monkeypatch):
    model, used = build(family), tokens()
    few_rows(monkeypatch, 2)
    scores = scoring.score(model, "kl", used)
    assert scores.blocks is not None
    assert scores.details is not None
    assert scores.details["sequence_tokens"] == [9] * 5
    for gone in range(4):
        keep = tuple(BlockKeep(index) for index in range(4) if index != gone)
        rebuilt = surgery.apply(plan_of(surgery.shape_of(model), keep), model)
        found = []
        for sequence in used.sequences:
            p, q = log_probabilities(model, sequence), log_probabilities(rebuilt, sequence)
            found.append(
                sum(math.exp(a) * (a - b) for row in zip(p, q, strict=True) for a, b in zip(*row, strict=True))
            )
        assert scores.details["sequence_kl"][gone] == pytest.approx(found, rel=1e-9)
        assert scores.blocks[gone] == pytest.approx(sum(found) / 45, rel=1e-9)
        low, high = scores.details["interval"][gone]
        assert low < scores.blocks[gone] < high


def test_kl_of_a_block_that_does_nothing_is_zero():
    model = build()
    idle(model, 2)
    scores = scoring.score(model, "kl", tokens())
    assert scores.blocks is not None
    assert scores.blocks[2] == pytest.approx(0, abs=1e-12)
    assert min(scores.blocks[:2]) > 1e-3


def idle(model, index: int) -> None:
    """Let a block pass its input on."""
    with torch.no_grad():
        model.model.layers[index].self_attn.o_proj.weight.zero_()
        model.model.layers[index].mlp.down_proj.weight.zero_()


def test_ppl_keeps_the_nll_of_every_sequence(monkeypatch):
    model, used = build(), tokens()
    scores = scoring.score(model, "ppl", used)
    few_rows(monkeypatch, 2)
    batched = scoring.score(model, "ppl", used)
    assert scores.details is not None
    assert batched.details is not None
    np.testing.assert_allclose(scores.details["sequence_nll"], batched.details["sequence_nll"], rtol=1e-12)
    np.testing.assert_allclose(scores.details["interval"], batched.details["interval"], rtol=1e-12)
    assert scores.details["sequence_tokens"] == [8] * 5
    shape = surgery.shape_of(model)
    rebuilt = surgery.apply(plan_of(shape, tuple(BlockKeep(i) for i in (0, 1, 3))), model)
    one = calibration.describe([used.sequences[3]], "made", seed=None, bos=None)
    assert scores.details["sequence_nll"][2][3] / 8 == pytest.approx(mean_nll(rebuilt, one), rel=1e-12)


def test_ppl_weights_sequences_of_different_length_by_their_tokens():
    model = build()
    used = calibration.describe([[1, 2, 3], [4, 5, 6, 7, 8, 9], [3, 1, 2]], "made", seed=None, bos=None)
    scores = scoring.score(model, "ppl", used)
    assert scores.details is not None
    assert scores.details["sequence_tokens"] == [2, 5, 2]
    assert scores.details["dense"] == pytest.approx(math.exp(mean_nll(model, used)), rel=1e-12)


def test_the_bootstrap_interval_is_that_of_a_plain_loop():
    random = np.random.default_rng(0)
    tokens_N = random.integers(5, 20, size=7)
    nll_LN = random.uniform(1, 3, size=(3, 7)) * tokens_N
    low, high = removal.interval(nll_LN, tokens_N, seed=4)
    counts = np.random.default_rng(4).multinomial(7, [1 / 7] * 7, size=removal.RESAMPLES)
    for block in range(3):
        drawn = []
        for row in counts:
            picked = [n for n in range(7) for _ in range(row[n])]
            drawn.append(sum(nll_LN[block, n] for n in picked) / sum(tokens_N[n] for n in picked))
        assert low[block] == pytest.approx(np.quantile(drawn, 0.025), rel=1e-2)
        assert high[block] == pytest.approx(np.quantile(drawn, 0.975), rel=1e-2)
        assert low[block] < nll_LN[block].sum() / tokens_N.sum() < high[block]


def test_one_sequence_has_no_interval():
    scores = scoring.score(build(), "ppl", tokens(rows=1))
    assert scores.details is not None
    assert scores.details["interval"] is None


# -- taylor -----------------------------------------------------------------------------------------------------------


def by_autograd(model, used: calibration.Calibration) -> list[float]:
    """The definition: one backward pass of the mean loss over everything, all gradients at once."""
    model.requires_grad_(True)
    ids = torch.from_numpy(np.stack(used.sequences))
    # Not `labels=ids`: transformers takes its loss in float32.
    token_nll(model(input_ids=ids, use_cache=False).logits, ids).mean().backward()
    scores = []
    for block in adapter(model).blocks:
        named = {name: p for name, p in block.named_parameters() if not name.endswith("bias")}
        scores.append(sum((p * p.grad).abs().sum().item() for p in named.values()))
    model.zero_grad(set_to_none=True)
    return scores


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("rows", [100, 2])
def test_taylor_equals_plain_autograd_whatever_the_batches(family, rows, monkeypatch):
    model, used = build(family), tokens()
    few_rows(monkeypatch, rows)
    scores = scoring.score(model, "taylor", used)
    # The stock norms round to float32 in both passes, at different scales.
    assert scores.blocks == pytest.approx(by_autograd(model, used), rel=1e-7)


@pytest.mark.parametrize("rows", [100, 2])
def test_taylor_by_sample_and_by_vector_equal_plain_autograd(rows, monkeypatch):
    model, used = build("qwen2"), tokens()
    few_rows(monkeypatch, rows)
    sample, vector = (scoring.score(model, f"taylor-{name}", used).blocks for name in ("sample", "vector"))
    model.requires_grad_(True)
    by_sample = np.zeros(4)
    products: list[dict[str, torch.Tensor]] = [{} for _ in range(4)]
    for sequence in used.sequences:
        model.zero_grad(set_to_none=True)
        ids = torch.from_numpy(sequence)[None]
        (token_nll(model(input_ids=ids, use_cache=False).logits, ids).sum() / 40).backward()
        for index, block in enumerate(adapter(model).blocks):
            for name, p in block.named_parameters():
                if not name.endswith("bias"):
                    by_sample[index] += (p * p.grad).abs().sum().item()
                    products[index][name] = products[index].get(name, 0) + p.detach() * p.grad
    assert sample == pytest.approx(by_sample.tolist(), rel=1e-7)
    assert vector == pytest.approx([sum(abs(t.sum().item()) for t in one.values()) for one in products], rel=1e-6)
    plain = scoring.score(model, "taylor", used).blocks
    assert plain is not None
    assert all(v < t < s for v, t, s in zip(vector or (), plain, sample or (), strict=True)), "triangle inequality"


REDUCE = {"sum": np.sum, "mean": np.mean, "max": np.max, "prod": np.prod}


@pytest.mark.parametrize("weight", criteria.REDUCTIONS)
@pytest.mark.parametrize("block", criteria.REDUCTIONS)
def test_weights_are_reduced_over_neurons_and_then_over_tensors(weight, block):
    model = build(blocks=2)
    how = criteria.Reductions(weight, block)
    scores = scoring.score(model, "mag", reductions=how)
    for index, layer in enumerate(model.model.layers):
        tensors = [np.abs(p.detach().numpy()) for p in layer.parameters()]
        values = [REDUCE[weight](t.sum(axis=1) if t.ndim == 2 else t) for t in tensors]
        expected = REDUCE[block](values)
        found = (scores.blocks or ())[index]
        assert found == pytest.approx(np.log(expected) if "prod" in (weight, block) else expected, rel=1e-10)
    assert scores.details == {"weight_reduction": weight, "block_reduction": block}


def test_products_over_many_neurons_stay_in_range_and_taylor_reduces_too():
    model = build(hidden=240, neurons=2000)
    scores = scoring.score(model, "mag", reductions=criteria.Reductions("prod", "prod"))
    assert scores.blocks is not None
    assert all(abs(value) > 800 for value in scores.blocks), "exp of it would leave the range of float64"
    plain, mean = (
        scoring.score(build(), "taylor", tokens(), reductions=criteria.Reductions(block=how)).blocks
        for how in ("sum", "mean")
    )
    assert mean == pytest.approx([value / 9 for value in plain or ()])


@pytest.mark.parametrize(
    ("criterion", "how", "expected"),
    [
        ("mag", criteria.Reductions("avg"), "--weight-reduction 'avg' is unknown; choose one of sum"),
        ("taylor", criteria.Reductions(block="median"), "--block-reduction 'median' is unknown"),
        ("ppl", criteria.Reductions("max"), "criterion ppl reduces no weights"),
        ("taylor-vector", criteria.Reductions("max"), "taylor-vector has one value a tensor"),
    ],
)
def test_reductions_that_mean_nothing_are_refused(criterion, how, expected):
    with pytest.raises(InputError, match=expected):
        scoring.score(build(), criterion, tokens(), reductions=how)


def test_taylor_equals_finite_differences(monkeypatch):
    # The stock norm rounds to float32, which differences of 1e-5 would not survive.
    monkeypatch.setattr(
        LlamaRMSNorm,
        "forward",
        lambda self, x: torch.nn.functional.rms_norm(x, self.weight.shape, self.weight, self.variance_epsilon),
    )
    model = build(blocks=2, hidden=8, head_dim=4, query_heads=2, kv_heads=1, neurons=6)
    used = tokens(rows=2, length=5)
    scores = scoring.score(model, "taylor", used)
    assert scores.blocks is not None
    total, step = 0.0, 1e-5
    ids = torch.from_numpy(np.stack(used.sequences))
    with torch.no_grad():
        for parameter in adapter(model).blocks[1].parameters():
            flat = parameter.view(-1)
            for index in range(len(flat)):
                value = flat[index].item()
                losses = []
                for moved in (value + step, value - step):
                    flat[index] = moved
                    losses.append(token_nll(model(input_ids=ids, use_cache=False).logits, ids).mean().item())
                flat[index] = value
                total += abs(value * (losses[0] - losses[1]) / (2 * step))
    assert scores.blocks[1] == pytest.approx(total, rel=1e-6)


def test_taylor_weights_batches_by_their_tokens():
    """The published sum of batch means would count the short sequence as much as the long ones."""
    model = build()
    long, short = [[1, 2, 3, 4, 5, 6, 7, 8], [9, 8, 7, 6, 5, 4, 3, 2]], [[5, 1, 4]]
    used = calibration.describe([*long, *short], "made", seed=None, bos=None)
    scores = scoring.score(model, "taylor", used)
    model.requires_grad_(True)
    for rows in (long, short):
        ids = torch.tensor(rows)
        (token_nll(model(input_ids=ids, use_cache=False).logits, ids).sum() / 16).backward()
    expected = [sum((p * p.grad).abs().sum().item() for p in block.parameters()) for block in adapter(model).blocks]
    assert scores.blocks == pytest.approx(expected, rel=1e-7)


@pytest.mark.parametrize(
    ("criterion", "estimator", "most"),
    [
        ("taylor", None, 1),
        ("taylor-sample", None, 1),
        ("llm-pruner", "param_first", 1),
        ("llm-pruner", "param_second", 1),
        ("llm-pruner", "param_mix", 2),
    ],
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gradients_of_one_block_are_held_at_a_time(criterion, estimator, most, dtype, monkeypatch):
    model, held = build(blocks=4, dtype=dtype), []
    few_rows(monkeypatch, 2)
    weights = list(model.parameters())
    size = model.model.layers[0].mlp.down_proj.weight.shape

    def look(done: int, total: int) -> None:
        assert all(weight.grad is None for weight in weights)
        if done in (total - total // 9, total):  # when block 1 is done, and block 0
            held.append(sum(type(one) is torch.Tensor and one.shape == size for one in gc.get_objects()))

    scoring.score(model, criterion, tokens(rows=3), variant=Variant(estimator=estimator), progress=look)
    assert held == [most, most]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_taylor_of_16_bit_weights_is_close_to_float32(dtype):
    model = build(dtype=dtype)
    stored = {name: p.clone() for name, p in model.named_parameters()}
    scores = scoring.score(model, "taylor", tokens())
    assert all(torch.equal(p, stored[name]) and p.dtype == stored[name].dtype for name, p in model.named_parameters())
    exact = build()
    exact.load_state_dict({name: p.double() for name, p in stored.items()})
    assert scores.blocks == pytest.approx(by_autograd(exact, tokens()), rel=0.05)


# -- modules ----------------------------------------------------------------------------------------------------------


def without(part: str, gone: int, blocks: int = 4) -> tuple[BlockKeep, ...]:
    lost = BlockKeep(gone, kv_groups="") if part == "attention" else BlockKeep(gone, neurons="")
    return tuple(lost if index == gone else BlockKeep(index) for index in range(blocks))


@pytest.mark.parametrize("family", FAMILIES)
def test_ppl_and_kl_by_module_equal_physically_rebuilt_models(family, monkeypatch):
    model, used = build(family), tokens()
    few_rows(monkeypatch, 2)
    found = {name: scoring.score(model, name, used, unit="module") for name in ("ppl", "kl")}
    for part in ("attention", "mlp"):
        for gone in range(4):
            rebuilt = surgery.apply(plan_of(surgery.shape_of(model), without(part, gone)), model)
            ppl, kl = (getattr(found[name], part)[gone] for name in ("ppl", "kl"))
            assert ppl == pytest.approx(math.exp(mean_nll(rebuilt, used)), rel=1e-12)
            divergences = [
                (np.exp(p) * (p - log_probabilities(rebuilt, sequence))).sum()
                for sequence in used.sequences
                for p in [log_probabilities(model, sequence)]
            ]
            assert kl == pytest.approx(sum(divergences) / 45, rel=1e-9)
            low, high = (found["ppl"].details or {})["interval"][part][gone]
            assert low < ppl < high
    assert found["ppl"].unit == "module"
    assert found["ppl"].blocks is None
    assert (found["kl"].details or {})["dense"] == 0


@pytest.mark.parametrize("family", FAMILIES)
def test_mag_and_taylor_of_the_modules_add_up_to_those_of_the_block(family):
    model, used = build(family), tokens()
    for name in ("mag", "taylor", "taylor-sample", "taylor-vector"):
        blocks = scoring.score(model, name, used).blocks
        modules = scoring.score(model, name, used, unit="module")
        sums = [(a or 0) + (m or 0) for a, m in zip(modules.attention or (), modules.mlp or (), strict=True)]
        assert sums == pytest.approx(list(blocks or ()), rel=1e-9)
    mlp = scoring.score(model, "mag", unit="module").mlp
    for index, block in enumerate(model.model.layers):
        weights = [
            block.post_attention_layernorm.weight,
            *(p for n, p in block.mlp.named_parameters() if "weight" in n),
        ]
        assert (mlp or ())[index] == pytest.approx(sum(w.detach().abs().sum().item() for w in weights))


def test_modules_that_are_not_there_have_no_score():
    model = build()
    pruned = surgery.apply(plan_of(surgery.shape_of(model), without("attention", 1)), model)
    for name in ("ppl", "kl", "taylor", "mag"):
        scores = scoring.score(pruned, name, tokens(), unit="module")
        assert [value is None for value in scores.attention or ()] == [False, True, False, False]
        assert None not in (scores.mlp or (None,))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_without_the_attention_of_block_0_generates_with_its_cache(family):
    model = build(family)
    shape = surgery.shape_of(model)
    scores = scoring.score(model, "ppl", tokens(), unit="module")
    # Attention of block 0 first, whatever the model says.
    forced = msgspec.structs.replace(scores, attention=(0.5, *(scores.attention or ())[1:]), details={"dense": 0.4})
    target = Target("target-params", shape.parameters - shape.attention_parameters(shape.blocks[0]))
    plan = make_plan_for("ppl", model="m", shape=shape, target=target, scores=forced, unit="module")
    assert plan.keep[0] == BlockKeep(0, kv_groups="")
    pruned = surgery.apply(plan, model)
    ids = torch.tensor([[3, 1, 4]])
    cached = pruned.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0, eos_token_id=None)
    plain = ids
    with torch.no_grad():
        for _ in range(8):
            chosen = pruned(input_ids=plain, use_cache=False).logits[:, -1].argmax(dim=-1, keepdim=True)
            plain = torch.cat([plain, chosen], dim=1)
    assert torch.equal(cached, plain)


def test_criteria_that_score_whole_blocks_refuse_modules():
    with pytest.raises(InputError, match="criterion bi scores by block, not by module"):
        scoring.score(build(), "bi", tokens(), unit="module")


# -- bi, mag, random, last --------------------------------------------------------------------------------------------


def states_by_hooks(model, used) -> list[list[np.ndarray]]:
    """For each sequence the L + 1 hidden states (T, D), caught by plain hooks."""
    inputs: dict[int, list] = {i: [] for i in range(len(model.model.layers) + 1)}
    modules = [*model.model.layers, model.model.norm]
    hooks = [m.register_forward_pre_hook(lambda _, args, i=i: inputs[i].append(args[0])) for i, m in enumerate(modules)]
    with torch.no_grad():
        for sequence in used.sequences:
            model(input_ids=torch.from_numpy(sequence)[None], use_cache=False)
    for hook in hooks:
        hook.remove()
    return [[inputs[i][n][0].numpy() for i in inputs] for n in range(len(used.sequences))]


def cosine(x: np.ndarray, y: np.ndarray) -> float:
    return float(x @ y / (np.linalg.norm(x) * np.linalg.norm(y)))


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("bi", lambda x, y: 1 - cosine(x, y)),
        ("relative-magnitude", lambda x, y: np.linalg.norm(y - x) / np.linalg.norm(y)),
        ("norm", lambda x, y: -np.linalg.norm(y)),
    ],
)
def test_traced_criteria_equal_a_loop_over_tokens(name, change, monkeypatch):
    model, used = build(), tokens()
    few_rows(monkeypatch, 2)
    scores = scoring.score(model, name, used)
    caught = states_by_hooks(model, used)
    for block in range(4):
        values = [change(x, y) for states in caught for x, y in zip(states[block], states[block + 1], strict=True)]
        assert (scores.blocks or ())[block] == pytest.approx(np.mean(values), rel=1e-10)


def test_angular_equals_a_loop_over_last_tokens(monkeypatch):
    model, used = build(), tokens()
    few_rows(monkeypatch, 2)
    scores = scoring.score(model, "angular", used)
    caught = states_by_hooks(model, used)
    assert scores.runs is not None
    assert {n: len(values) for n, values in scores.runs.items()} == {"1": 4, "2": 3, "3": 2, "4": 1}
    for n in range(1, 5):
        for start in range(5 - n):
            angles = [math.acos(cosine(states[start][-1], states[start + n][-1])) / math.pi for states in caught]
            assert scores.runs[str(n)][start] == pytest.approx(np.mean(angles), rel=1e-9)
    assert scores.blocks == scores.runs["1"]


def test_angular_distance_of_equal_states_is_zero_not_nan():
    state = torch.rand(50, 1, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    distance = angular.distances(torch.cat([state, state * 3, -state], dim=1))
    assert distance[0, 1] == pytest.approx(0, abs=1e-7)
    assert distance[0, 2] == pytest.approx(1, abs=1e-7)


@pytest.mark.parametrize("index", [0, 3])
def test_a_block_that_does_nothing_turns_nothing_even_if_it_is_the_last(index):
    model = build()
    idle(model, index)
    for name in ("bi", "relative-magnitude", "angular"):
        scores = scoring.score(model, name, tokens())
        assert scores.blocks is not None
        assert scores.blocks[index] == pytest.approx(0, abs=1e-7)
        assert min(value for one, value in enumerate(scores.blocks) if one != index) > 1e-3


@pytest.mark.parametrize("family", FAMILIES)
def test_mag_sums_matrices_and_norms_but_no_bias(family):
    model = build(family)
    scores = scoring.score(model, "mag")
    expected = [0.0] * 4
    for name, parameter in model.named_parameters():
        if ".layers." in name and not name.endswith(".bias"):
            expected[int(name.split(".")[2])] += np.abs(parameter.detach().numpy()).sum()
    assert scores.blocks == pytest.approx(expected, rel=1e-12)
    assert scores.calibration is None


def test_random_scores_follow_the_seed_and_last_removes_from_the_end():
    model = surgery.build(small(), device="meta")
    first, again, other = (scoring.score(model, "random", seed=seed).blocks for seed in (1, 1, 2))
    assert first == again != other
    last = scoring.score(model, "last").blocks
    assert last is not None
    assert selection.removal_order(last, (0, 0)) == (3, 2, 1, 0)


def test_an_unknown_parameter_is_refused_not_skipped():
    model = build()
    model.model.layers[2].mlp.router = torch.nn.Linear(24, 4, bias=False).double()
    for name in ("mag", "taylor"):
        with pytest.raises(UnsupportedError, match=r"mlp\.router\.weight is neither a projection nor a norm"):
            scoring.score(model, name, tokens())


# -- width ------------------------------------------------------------------------------------------------------------


@given(groups=st.integers(1, 5), per_group=st.integers(1, 4), head_dim=st.integers(1, 5), seed=st.integers(0, 99))
def test_head_scores_fold_to_the_group_that_the_head_reads(groups, per_group, head_dim, seed):
    columns = np.random.default_rng(seed).random(groups * per_group * head_dim)
    expected = np.zeros(groups)
    for head in range(groups * per_group):
        expected[head // per_group] += columns[head * head_dim : (head + 1) * head_dim].sum()
    folded = weights.per_group(torch.from_numpy(columns), groups)
    np.testing.assert_allclose(folded.numpy(), expected, rtol=1e-12)


def test_mag_sp_equals_column_norms_by_loop():
    model = build()
    scores = scoring.score(model, "mag-sp")
    assert scores.kv_groups is not None
    assert scores.neurons is not None
    for index, block in enumerate(model.model.layers):
        o, down = (p.weight.detach().numpy() for p in (block.self_attn.o_proj, block.mlp.down_proj))
        for group in range(3):
            columns = [o[:, j] for head in range(2) for j in range((2 * group + head) * 6, (2 * group + head + 1) * 6)]
            assert scores.kv_groups[index][group] == pytest.approx(sum(np.linalg.norm(c) for c in columns), rel=1e-6)
        assert scores.neurons[index] == pytest.approx([np.linalg.norm(down[:, j]) for j in range(20)], rel=1e-6)


def wanda_by_hand(model, used, index: int) -> tuple[list[float], list[float]]:
    """Scores of one block of a model, from the inputs that its two output projections see, with loops over columns."""
    block = model.model.layers[index]
    seen: dict[str, list[np.ndarray]] = {"o": [], "down": []}
    modules = {"o": block.self_attn.o_proj, "down": block.mlp.down_proj}
    hooks = [
        module.register_forward_pre_hook(lambda _, args, name=name: seen[name].append(args[0][0].numpy()))
        for name, module in modules.items()
    ]
    with torch.no_grad():
        for sequence in used.sequences:
            model(input_ids=torch.from_numpy(sequence)[None], use_cache=False)
    for hook in hooks:
        hook.remove()
    columns: dict[str, list[float]] = {}
    for name, module in modules.items():
        matrix = np.abs(module.weight.detach().numpy())
        square = np.mean([(x_TF**2).sum(axis=0) for x_TF in seen[name]], axis=0)
        columns[name] = [(matrix[:, j] * math.sqrt(square[j])).mean() for j in range(matrix.shape[1])]
    heads = [sum(columns["o"][h * 6 : (h + 1) * 6]) for h in range(len(columns["o"]) // 6)]
    return [heads[2 * g] + heads[2 * g + 1] for g in range(len(heads) // 2)], columns["down"]


@pytest.mark.parametrize("family", FAMILIES)
def test_wanda_sp_without_a_target_scores_the_dense_model(family):
    model, used = build(family), tokens()
    scores = scoring.score(model, "wanda-sp", used)
    assert scores.kv_groups is not None
    assert scores.neurons is not None
    for index in range(4):
        groups, neurons = wanda_by_hand(model, used, index)
        assert scores.kv_groups[index] == pytest.approx(groups, rel=1e-9)
        assert scores.neurons[index] == pytest.approx(neurons, rel=1e-9)
    assert scores.details == {"towards": None}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("rows", [100, 2])
def test_wanda_sp_scores_each_block_behind_physically_pruned_ones(family, rows, monkeypatch):
    model, used = build(family), tokens()
    shape = surgery.shape_of(model)
    few_rows(monkeypatch, rows)
    # Block 1 stays whole, as a protected one would.
    blocks = tuple(
        block if i == 1 else msgspec.structs.replace(block, query_heads=4, kv_heads=2, neurons=13)
        for i, block in enumerate(shape.blocks)
    )
    towards = msgspec.structs.replace(shape, blocks=blocks)
    scores = scoring.score(model, "wanda-sp", used, towards=towards)
    assert scores.kv_groups is not None
    assert scores.neurons is not None
    keep = [BlockKeep(i) for i in range(4)]
    for index in range(4):
        before = model if index == 0 else surgery.apply(plan_of(shape, tuple(keep)), model)
        groups, neurons = wanda_by_hand(before, used, index)
        assert scores.kv_groups[index] == pytest.approx(groups, rel=1e-9)
        assert scores.neurons[index] == pytest.approx(neurons, rel=1e-9)
        if index != 1:
            kept = selection.highest(groups, 2), selection.highest(neurons, 13)
            keep[index] = block_keep(index, shape.blocks[index], *kept)
    dense = scoring.score(model, "wanda-sp", used)
    assert dense.kv_groups is not None
    assert dense.kv_groups[0] == scores.kv_groups[0]
    assert dense.kv_groups[3] != pytest.approx(scores.kv_groups[3], rel=1e-3), "the order of blocks does not matter"
    wanted = {"query_heads": [4, 6, 4, 4], "kv_groups": [2, 3, 2, 2], "neurons": [13, 20, 13, 13]}
    assert scores.details == {"towards": wanted}
    assert criteria.remark(scores, towards) is None
    older = msgspec.structs.replace(scores, details={"towards": {k: wanted[k] for k in ("kv_groups", "neurons")}})
    assert criteria.remark(older, towards) is None
    assert "computed with other widths" in str(criteria.remark(older, shape))
    assert "computed with other widths" in str(criteria.remark(scores, shape))
    assert "computed with dense outputs" in str(criteria.remark(dense, towards))
    assert criteria.remark(scoring.score(model, "mag"), towards) is None


def test_width_criteria_skip_removed_modules():
    model = build()
    shape = surgery.shape_of(model)
    keep = (BlockKeep(0), BlockKeep(1, kv_groups=""), BlockKeep(2, neurons=""), BlockKeep(3))
    plan = make_plan(model="m", shape=shape, method="t", target=Target("shape", "x"), keep=keep)
    pruned = surgery.apply(plan, model)
    for name in ("wanda-sp", "mag-sp"):
        scores = scoring.score(pruned, name, tokens())
        assert scores.kv_groups is not None
        assert scores.neurons is not None
        assert [len(g) for g in scores.kv_groups] == [3, 0, 3, 3]
        assert [len(n) for n in scores.neurons] == [20, 20, 0, 20]
    for name in ("ppl", "taylor", "bi", "mag"):
        blocks = scoring.score(pruned, name, tokens()).blocks
        assert blocks is not None
        assert len(blocks) == 4


# -- a positive control -----------------------------------------------------------------------------------------------


@pytest.mark.data
@pytest.mark.parametrize("source", ["tinystories", "self"])
def test_every_criterion_finds_the_blocks_that_are_redundant_by_construction(grown, data_dir, source):
    from shortllama import checkpoint

    model, tokenizer = checkpoint.load(grown)
    src = source if source == "self" else str(data_dir / "tinystories" / "tinystories_sample.txt")
    used = calibration.load(src, tokenizer=tokenizer, model=model)
    for name in ("ppl", "kl", "taylor", "taylor-sample", "taylor-vector", "bi", "relative-magnitude"):
        blocks = scoring.score(model, name, used).blocks
        assert blocks is not None
        assert sorted(selection.removal_order(blocks, (0, 0))[:7]) == REDUNDANT, name
    scores = scoring.score(model, "ppl", used)
    assert scores.details is not None
    interval = np.array(scores.details["interval"])
    chosen = np.isin(np.arange(12), REDUNDANT)
    assert interval[chosen, 1].max() < interval[~chosen, 0].min(), "the intervals do not tell them apart"
