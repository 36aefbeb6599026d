"""Iterative scoring against the naive loop: prune the model for real, score what is left, again and again."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from test_criteria import build, few_rows, log_probabilities, tokens
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from shortllama import removals, scoring, surgery
from shortllama.errors import InputError
from shortllama.planning import goal_for, make_plan_for
from shortllama.plans import Target
from shortllama.removals import Goal, Piece
from shortllama.shape import ModelShape
from tests.strategies import plan_of

BLOCKS = 5


def naive(model, name: str, used, unit: removals.Unit, count: int, protect=(0, 0)) -> list[tuple[Piece, float]]:
    """Greedy removal with a new model for every step; pieces by their blocks in the whole model."""
    shape = surgery.shape_of(model)
    gone: list[tuple[Piece, float]] = []
    while len(gone) < count:
        lost = [piece for piece, _ in gone]
        keep = removals.keep_after(shape, lost)
        members = [one.index for one in keep]
        pruned = surgery.apply(plan_of(shape, keep), model)
        scores = scoring.score(pruned, name, used, unit=unit)
        values = {"block": scores.blocks, "attention": scores.attention, "mlp": scores.mlp}
        now = surgery.shape_of(pruned)
        dense = (scores.details or {}).get("dense") or 0
        ranked = []
        for block, part in removals.pieces(now, unit):
            value = (values[part] or ())[block]
            piece = Piece(members[block], part)
            assert value is not None
            if piece in removals.pieces(shape, unit, protect):
                cost = 1 if unit == "block" else removals.parameters(now, Piece(block, part))
                ranked.append(((value - (dense if unit == "module" else 0)) / cost, piece, value))
        _, piece, value = min(ranked, key=lambda one: one[0])
        gone.append((piece, value))
    return gone


def count(blocks: int) -> Goal:
    return Goal(blocks, "floor", "count")


@pytest.mark.parametrize("protect", [(0, 0), (1, 1)])
@pytest.mark.parametrize(
    ("name", "unit"),
    [("ppl", "block"), ("taylor", "block"), ("bi", "block"), ("ppl", "module"), ("taylor-vector", "module")],
)
def test_iterating_equals_the_loop_over_rebuilt_models(name, unit, protect, monkeypatch):
    model, used = build("qwen3", blocks=BLOCKS), tokens()
    few_rows(monkeypatch, 2)
    wanted = 3 if unit == "block" else 6
    scores = scoring.iterate(model, name, used, goal=count(wanted), protect=protect, unit=unit)
    expected = naive(model, name, used, unit, wanted, protect)
    assert scores.order == tuple(str(piece) for piece, _ in expected)
    assert scores.details is not None
    assert [one["removed"] for one in scores.details["steps"]] == list(scores.order or ())
    assert [one["score"] for one in scores.details["steps"]] == pytest.approx([v for _, v in expected], rel=1e-7)
    assert scores.cost is not None
    assert scores.cost.tokens == wanted * 45
    dense = scoring.score(model, name, used, unit=unit)
    assert (scores.blocks, scores.attention, scores.mlp) == (dense.blocks, dense.attention, dense.mlp)


@pytest.mark.parametrize("unit", ["block", "module"])
def test_iterative_kl_is_to_the_dense_model_throughout(unit, monkeypatch):
    model, used = build(blocks=BLOCKS), tokens()
    few_rows(monkeypatch, 2)
    scores = scoring.iterate(model, "kl", used, goal=count(3), unit=unit)
    gone: list[Piece] = []
    for step in (scores.details or {})["steps"]:
        gone.append(removals.parse(step["removed"]))
        keep = removals.keep_after(surgery.shape_of(model), gone)
        pruned = surgery.apply(plan_of(surgery.shape_of(model), keep), model)
        total = 0.0
        for sequence in used.sequences:
            p, q = log_probabilities(model, sequence), log_probabilities(pruned, sequence)
            total += (np.exp(p) * (p - q)).sum()
        assert step["score"] == pytest.approx(total / 45, rel=1e-9)


@pytest.mark.parametrize("name", ["ppl", "kl"])
def test_each_step_runs_exactly_the_blocks_it_must(name, monkeypatch):
    model, passes = build(blocks=6), []
    forward = LlamaDecoderLayer.forward
    monkeypatch.setattr(
        LlamaDecoderLayer, "forward", lambda self, *args, **kwargs: passes.append(1) or forward(self, *args, **kwargs)
    )
    calls: list[tuple[int, int]] = []
    scoring.iterate(model, name, tokens(), goal=count(4), progress=lambda done, total: calls.append((done, total)))
    assert len(passes) == sum(a * (a + 1) // 2 for a in (6, 5, 4, 3))
    assert calls == sorted(calls), "progress goes backward"
    assert calls[-1][0] == calls[-1][1], "progress does not end at the total"


def test_the_model_comes_back_as_it_was():
    model = build(blocks=BLOCKS)
    stored = {name: p.clone() for name, p in model.state_dict().items()}
    scoring.iterate(model, "taylor", tokens(), goal=count(3), unit="module")
    assert all(torch.equal(value, stored[name]) for name, value in model.state_dict().items())
    assert all("forward" not in vars(module) for module in model.modules())


@pytest.mark.parametrize("unit", ["block", "module"])
@pytest.mark.parametrize(("kind", "value"), [("ratio", 0.5), ("target-params", 0.6)])
def test_a_plan_takes_what_the_iterative_run_removed(unit, kind, value):
    model, used = build(blocks=BLOCKS), tokens()
    shape = surgery.shape_of(model)
    target = Target(kind, value if kind == "ratio" else round(value * shape.parameters))
    goal = goal_for("ppl", shape=shape, target=target, unit=unit)
    scores = scoring.iterate(model, "ppl", used, goal=goal, unit=unit)
    made = make_plan_for("ppl", model="m", shape=shape, target=target, scores=scores, unit=unit, iterative=True)
    order = [removals.parse(text) for text in scores.order or ()]
    taken = goal.count([goal.size(shape, piece) for piece in order])
    assert len(order) - taken in (0, 1), "more was scored than the target needs"
    assert made.keep == removals.keep_after(shape, order[:taken])
    assert "iterative" in made.method
    longer = scoring.iterate(model, "ppl", used, goal=Goal(10**9, "reach", "parameters"), unit=unit)
    assert (longer.order or ())[: len(order)] == scores.order
    assert len(longer.order or ()) == len(removals.pieces(shape, unit)) - 1, "one piece must stay"


def test_iterative_scores_serve_only_what_they_were_made_for():
    model = build(blocks=BLOCKS)
    shape: ModelShape = surgery.shape_of(model)
    scores = scoring.iterate(model, "ppl", tokens(), goal=count(2))
    plain = scoring.score(model, "ppl", tokens())

    def plan(given, blocks=2, **options):
        return make_plan_for("ppl", model="m", shape=shape, target=Target("blocks", blocks), scores=given, **options)

    first = removals.parse((scores.order or ())[0]).block
    cases = [
        (lambda: plan(scores), "these scores are iterative, add --iterative"),
        (lambda: plan(plain, iterative=True), "score again with --iterative"),
        (lambda: plan(scores, 3, iterative=True), "stop after 2 removals, and --blocks 3 takes 3"),
        (lambda: plan(scores, 2, iterative=True, protect=(first + 1, 0)), f"remove {first}, which does not go here"),
        (
            lambda: make_plan_for("mag", model="m", shape=shape, target=Target("blocks", 1), iterative=True),
            "not for mag",
        ),
        (lambda: scoring.iterate(model, "ppl", tokens(), goal=count(0)), "nothing may go"),
    ]
    for call, expected in cases:
        with pytest.raises(InputError) as error:
            call()
        assert expected in str(error.value)
        assert "\n" not in str(error.value)
