"""Scoring as a step: what it leaves behind, what it records, what it refuses; and the Python interface."""

from __future__ import annotations

import math
import subprocess
import sys

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

import shortllama as sl
from shortllama import calibration, costs, criteria, removals, scoring, surgery
from shortllama.criteria import bi, trace
from shortllama.errors import InputError, PlanError, UnsupportedError
from shortllama.plans import BlockKeep, shape_after
from shortllama.removals import Goal
from shortllama.scores import Scores, read_scores, write_scores


@pytest.fixture(scope="module")
def used() -> calibration.Calibration:
    ids = np.random.default_rng(0).integers(0, 97, size=(4, 8))
    return calibration.describe(ids, "made", seed=0, bos=None)


@pytest.fixture
def model(tiny_shape):
    return surgery.build(tiny_shape, std=0.15)


@pytest.mark.parametrize("criterion", criteria.CRITERIA)
def test_the_model_comes_back_as_it_was(model, used, criterion, tiny_shape):
    model.train()
    frozen = model.model.layers[1].mlp.up_proj.weight.requires_grad_(False)
    for parameter in model.parameters():
        if parameter is not frozen:
            parameter.requires_grad_(True)
    model.model.layers[2].eval()
    own_gradient = torch.ones_like(model.model.layers[0].mlp.up_proj.weight)
    model.model.layers[0].mlp.up_proj.weight.grad = own_gradient
    stored = {name: p.clone() for name, p in model.state_dict().items()}
    towards = msgspec.structs.replace(
        tiny_shape, blocks=tuple(msgspec.structs.replace(b, neurons=50) for b in tiny_shape.blocks)
    )
    scoring.score(model, criterion, used, towards=towards)
    assert model.training
    assert not model.model.layers[2].training
    assert model.model.layers[0].training
    assert not frozen.requires_grad
    assert all(p.requires_grad for p in model.parameters() if p is not frozen)
    assert model.model.layers[0].mlp.up_proj.weight.grad is own_gradient
    assert (own_gradient == 1).all()
    assert sum(p.grad is not None for p in model.parameters()) == 1
    assert all(torch.equal(value, stored[name]) for name, value in model.state_dict().items())
    for module in model.modules():
        assert "forward" not in vars(module)
        assert not module._forward_hooks
        assert not module._forward_pre_hooks


@pytest.mark.parametrize("criterion", criteria.CRITERIA)
def test_scores_describe_themselves_and_repeat(model, used, criterion, tiny_shape, tmp_path):
    calls: list[tuple[int, int]] = []
    scores = scoring.score(model, criterion, used, seed=3, progress=lambda done, total: calls.append((done, total)))
    chosen = criteria.lookup(criterion)
    assert (scores.criterion, scores.unit) == (chosen.NAME, chosen.UNITS[0])
    assert scores.base_digest == tiny_shape.digest()
    assert scores.calibration == (used.description if chosen.NEEDS == "calibration" else None)
    assert scores.cost is not None
    assert scores.cost.wall_s > 0
    assert scores.cost.tokens == (32 if chosen.NEEDS == "calibration" else 0)
    if chosen.UNITS[0] == "block":
        assert scores.blocks is not None
        assert len(scores.blocks) == 4
    else:
        assert [len(g) for g in scores.kv_groups or ()] == [4] * 4
        assert [len(n) for n in scores.neurons or ()] == [96] * 4
    if chosen.NEEDS != "nothing":
        assert calls == sorted(calls), "progress goes backward"
        assert calls[-1][0] == calls[-1][1], "progress does not end at the total"
    assert scoring.score(model, criterion, used, seed=3).digest() == scores.digest()
    write_scores(tmp_path / "scores.json", scores)
    assert read_scores(tmp_path / "scores.json") == scores


def test_peak_memory_sees_a_large_allocation():
    cost = costs.start()
    held = torch.ones(64 * 2**20 // 4)
    del held
    peak, reasons = cost().peak_bytes, cost().reasons
    if peak is None:
        pytest.skip(reasons["peak_bytes"])
    assert 60 * 2**20 < peak < 100 * 2**20


# -- several criteria at once -----------------------------------------------------------------------------------------


@pytest.fixture
def ran(monkeypatch) -> list[int]:
    """One entry for each block that computes, the number of sequences."""
    rows: list[int] = []
    forward = LlamaDecoderLayer.forward

    def counted(self, hidden_states, *args, **kwargs):
        rows.append(len(hidden_states))
        return forward(self, hidden_states, *args, **kwargs)

    monkeypatch.setattr(LlamaDecoderLayer, "forward", counted)
    return rows


def test_criteria_that_watch_share_one_pass_and_the_rest_run_by_themselves(model, used, ran):
    calls: list[tuple[int, int]] = []
    names = ("ppl", *criteria.TRACED, "mag")
    found = scoring.score_all(model, names, used, progress=lambda done, total: calls.append((done, total)))
    assert list(found) == list(names)
    assert len(ran) == 4 + (4 * 3 // 2 + 4), "bi, angular, ... in 4 block passes, ppl in 10"
    assert calls == sorted(calls), "progress goes backward"
    assert calls[-1][0] == calls[-1][1], "progress does not end at the total"
    for name, scores in found.items():
        assert scores.digest() == scoring.score(model, name, used).digest()
    traced = [found[name].cost for name in criteria.TRACED]
    assert all(cost == traced[0] for cost in traced)
    assert traced[0] is not None
    assert (traced[0].block_passes, traced[0].tokens, traced[0].shared) == (4.0, 32, criteria.TRACED)
    for name, passes in (("ppl", 10.0), ("mag", 0.0)):
        cost = found[name].cost
        assert cost is not None
        assert (cost.block_passes, cost.shared, cost.runs) == (passes, (), 1)


@pytest.mark.parametrize("names", [("bi", "pp"), ("ppl", "wanda-sp")])
def test_all_criteria_are_checked_before_any_is_measured(model, used, ran, names):
    with pytest.raises(InputError):
        scoring.score_all(model, names, used, unit="module")
    assert not ran


@pytest.mark.parametrize(
    ("name", "unit", "passes"),
    [("kl", "block", 10), ("ppl", "module", 4 + 2 * 10), ("taylor", "block", 4 + 4), ("wanda-sp", "width", 4)],
)
def test_block_passes_are_those_that_ran(model, used, ran, name, unit, passes):
    cost = scoring.score(model, name, used, unit=unit).cost
    assert cost is not None
    assert cost.block_passes == passes == sum(ran) / len(used.sequences)


def test_iterative_block_passes_add_up(model, used, ran):
    cost = scoring.iterate(model, "ppl", used, goal=Goal(2, "floor", "count")).cost
    assert cost is not None
    assert cost.block_passes == 10 + 6 == sum(ran) / len(used.sequences)
    assert cost.tokens == 2 * 32


@given(
    st.integers(1, 40).flatmap(
        lambda size: st.tuples(
            *[st.lists(st.floats(-8, 8, width=32), min_size=size, max_size=size)] * 2, st.sampled_from([1.0, 1e-4])
        )
    )
)
def test_the_law_of_cosines_gives_the_turn(drawn):
    x, f = (torch.tensor(values, dtype=torch.float64)[None, None] for values in drawn[:2])
    f = f * drawn[2]
    passage = trace.Passage(0, x, x + f, None)
    turned = bi.turn(passage).item()
    if x.norm() < 1e-6 or (x + f).norm() < 1e-6:
        return
    # 1 - cos of a small angle from its sine, which needs no difference of nearly equal numbers.
    u, v = x[0, 0] / x.norm(), (x + f)[0, 0] / (x + f).norm()
    assert turned == pytest.approx((u - v).square().sum().item() / 2, rel=1e-6, abs=1e-13)


def test_a_zero_state_turns_by_one_and_no_turn_is_exactly_zero():
    zero, one = torch.zeros(1, 1, 4), torch.ones(1, 1, 4)
    assert bi.turn(trace.Passage(0, zero, one, None)).item() == 1
    assert bi.turn(trace.Passage(0, one, zero, None)).item() == 1
    assert bi.turn(trace.Passage(0, one, one, None)).item() == 0


def test_a_small_turn_keeps_its_digits_in_float32():
    """1 minus a float32 cosine is a multiple of 6e-8, and blocks that hardly matter turn by little more."""
    x = torch.randn(1, 50, 512)
    across = torch.randn(1, 50, 512)
    across -= x * (x * across).sum(-1, keepdim=True) / x.square().sum(-1, keepdim=True)
    across *= x.norm(dim=-1, keepdim=True) / across.norm(dim=-1, keepdim=True)
    for angle in (1e-2, 1e-3):
        expected = 1 - 1 / math.sqrt(1 + angle**2)
        assert bi.turn(trace.Passage(0, x, x + angle * across, None)).mean().item() == pytest.approx(expected, rel=1e-3)


# -- bad input --------------------------------------------------------------------------------------------------------


def test_bad_requests_are_answered_in_one_line(model, used, tiny_shape):
    high = calibration.describe([[1, 97]], "high.jsonl", seed=None, bos=None)
    cases = [
        (lambda: scoring.score(model, "ppl"), InputError, "criterion ppl needs calibration"),
        (lambda: scoring.score(model, "bi", high), InputError, "high.jsonl: sequence 1 holds token id 97"),
        (lambda: scoring.score(model, "pp", used), InputError, "did you mean ppl"),
        (lambda: scoring.score(torch.nn.Linear(2, 2), "mag"), UnsupportedError, "not supported"),
        (lambda: scoring.score(surgery.build(tiny_shape, device="meta"), "mag"), InputError, "a shape without any"),
    ]
    for call, kind, expected in cases:
        with pytest.raises(kind) as error:
            call()
        assert expected in str(error.value)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("criterion", ["ppl", "kl", "taylor", "bi", "angular", "mag", "wanda-sp"])
def test_broken_weights_give_no_ranking(model, used, criterion):
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] = float("nan")
    with pytest.raises(InputError, match="not finite"):
        scoring.score(model, criterion, used)


def test_equal_scores_are_refused(tiny_shape, used):
    model = surgery.build(tiny_shape)
    with torch.no_grad():
        for block in model.model.layers:
            block.self_attn.o_proj.weight.zero_()
            block.mlp.down_proj.weight.zero_()
    with pytest.raises(InputError, match="ranks nothing"):
        scoring.score(model, "ppl", used)


# -- the Python interface ---------------------------------------------------------------------------------------------


def test_plan_and_apply_in_python(model, used):
    plan = sl.plan(model, method="bi", ratio=0.25, calibration=used)
    assert not plan.blind
    assert plan.achieved.blocks == 3
    assert plan.provenance.calibration == used.description["digest"]
    pruned = sl.apply(plan, model)
    assert len(pruned.model.layers) == 3
    assert len(model.model.layers) == 4
    scores = sl.score(model, "bi", calibration=used)
    assert isinstance(scores, Scores)
    both = sl.score(model, ["bi", "angular"], calibration=used)
    assert {name: one.criterion for name, one in both.items()} == {"bi": "bi", "angular": "angular"}
    assert both["bi"].digest() == scores.digest()
    assert sl.plan(model, method="bi", blocks=1, scores=scores).keep == plan.keep


def test_self_calibration_is_the_default(model):
    model.config.bos_token_id = 1
    first = sl.plan(model, method="taylor", blocks=1, samples=2, length=16)
    assert first == sl.plan(model, method="taylor", blocks=1, samples=2, length=16)
    source = sl.score(model, "taylor", samples=2, length=16).calibration
    assert source is not None
    assert source["source"] == "self"
    assert source["tokens"] == 32


def test_modules_iteration_and_presets_in_python(model, used):
    shape = surgery.shape_of(model)
    plan = sl.plan(model, method="ppl", ratio=0.3, unit="module", iterative=True, calibration=used)
    assert plan.method == "ppl (modules, iterative)"
    pruned = sl.apply(plan, model)
    assert surgery.shape_of(pruned).parameters == shape_after(shape, plan.keep).parameters
    steps = sl.plan(model, method="taylor", blocks=2, iterative=True, calibration=used, protect=(1, 0))
    goal = Goal(2, "floor", "count")
    scores = scoring.iterate(model, "taylor", used, goal=goal, protect=(1, 0))
    assert steps.keep == removals.keep_after(shape, map(removals.parse, scores.order or ()))
    assert sl.plan("llama-7b", preset="paper-llama-7b-taylor-20").keep[24:] == (BlockKeep(30), BlockKeep(31))
    mean = sl.plan(model, method="mag", blocks=1, reductions=criteria.Reductions("mean", "mean"))
    direct = scoring.score(model, "mag", reductions=criteria.Reductions("mean", "mean"))
    assert mean.provenance.scores_digest == direct.digest()
    modules = sl.score(model, "kl", calibration=used, unit="module")
    assert (modules.unit, modules.blocks) == ("module", None)
    with pytest.raises(InputError, match="give either a method or a preset"):
        sl.plan(model, ratio=0.5)


def test_width_plans_are_scored_towards_their_own_target(model, used, tiny_shape):
    plan = sl.plan(model, method="wanda-sp", ratio=0.5, calibration=used)
    after = shape_after(tiny_shape, plan.keep)
    direct = scoring.score(model, "wanda-sp", used, towards=after)
    assert criteria.remark(direct, after) is None
    assert plan.provenance.scores_digest == direct.digest()
    assert sl.apply(plan, model).model.layers[0].mlp.down_proj.in_features == 48


def test_names_work_as_models(model, used, tmp_path):
    blind = sl.plan("llama-7b", method="wanda-sp", ratio=0.2)
    assert blind.blind
    model.save_pretrained(tmp_path / "mine")
    named = sl.plan(tmp_path / "mine", method="mag", blocks=1)
    assert named.base.model == "mine", "a plan must not hold a path"
    assert named.keep == sl.plan(model, method="mag", blocks=1).keep
    loaded, tokenizer = sl.load(tmp_path / "mine")
    assert tokenizer is None
    assert sl.plan(loaded, method="mag", blocks=1).keep == named.keep
    with pytest.raises(PlanError):
        sl.apply(blind, loaded)


@pytest.mark.parametrize(
    ("target", "expected"),
    [({}, "saw 0"), ({"ratio": 0.5, "blocks": 1}, "saw 2"), ({"ratio": 1.5}, "outside"), ({"blocks": 4}, "only 3 may")],
)
def test_bad_targets_are_refused_before_scoring(model, target, expected, monkeypatch):
    monkeypatch.setattr(scoring, "score", lambda *_, **__: pytest.fail("scored before checking"))
    with pytest.raises(InputError, match=expected):
        sl.plan(model, method="ppl", **target)


def test_importing_and_planning_shapes_loads_no_torch():
    code = (
        "import sys, shortllama as sl; import shortllama.criteria, shortllama.evaluation.results, shortllama.texts;"
        "assert 'numpy' not in sys.modules, 'numpy';"
        "plan = sl.plan('llama-7b', method='ppl', ratio=0.2); assert type(plan).__name__ == 'Plan';"
        "assert not {'torch', 'transformers'} & set(sys.modules), 'torch'"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'prun'"):
        _ = sl.prun
