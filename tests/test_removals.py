"""Pieces and goals against brute force, and plans by module."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from strategies import scores_of, shapes

from shortllama import removals, selection
from shortllama.errors import InputError, PlanError
from shortllama.planning import make_plan_for
from shortllama.plans import BlockKeep, Target, shape_after
from shortllama.removals import Goal, Piece
from shortllama.scores import Scores
from shortllama.shape import ModelShape

goals = st.builds(Goal, st.integers(0, 60), st.sampled_from(["floor", "reach", "nearest"]), st.just("parameters"))


@given(st.lists(st.integers(1, 9), max_size=9), st.integers(0, 60))
def test_the_nearest_count_equals_brute_force_and_ties_remove_more(sizes: list[int], excess: int) -> None:
    distances = [abs(sum(sizes[:count]) - excess) for count in range(len(sizes) + 1)]
    best = [count for count, distance in enumerate(distances) if distance == min(distances)]
    assert selection.nearest_count(sizes, excess) == max(best)


@given(goals, st.lists(st.integers(1, 9), min_size=1, max_size=9))
def test_a_goal_is_settled_only_when_no_order_of_the_rest_changes_the_count(goal: Goal, sizes: list[int]) -> None:
    for done in range(len(sizes)):
        if goal.settled(sum(sizes[:done]), min(sizes[done:])):
            assert goal.count(sizes) <= done
            assert goal.count(sizes) == goal.count(sizes[:done])
    steps = goal.steps(sizes)
    assert all(goal.count(order) <= steps for order in (sizes, sorted(sizes), sorted(sizes, reverse=True)))


@given(shapes(max_blocks=5), st.data())
def test_what_is_left_has_the_parameters_that_the_pieces_leave(shape: ModelShape, data: st.DataObject) -> None:
    pieces = removals.pieces(shape, "module")
    gone = data.draw(st.sets(st.sampled_from(pieces), max_size=len(pieces) - 1))
    after = shape_after(shape, removals.keep_after(shape, gone))
    assert shape.parameters - after.parameters == sum(removals.parameters(shape, piece) for piece in gone)
    assert [removals.parse(str(piece)) for piece in pieces] == list(pieces)


@pytest.mark.parametrize("text", ["", "a", "1.ffn", "1.", ".mlp", "-1", "1.block"])
def test_text_that_names_no_piece_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="names no block or module"):
        removals.parse(text)


SHAPE = ModelShape.uniform(vocabulary=50, hidden=8, head_dim=2, blocks=6, query_heads=4, kv_heads=2, neurons=20)
MHA, FFN = SHAPE.attention_parameters(SHAPE.blocks[0]), SHAPE.mlp_parameters(SHAPE.blocks[0])


def by_module(attention, mlp, **details) -> Scores:
    return Scores("ppl", "module", SHAPE.digest(), attention=attention, mlp=mlp, details=details or None)


def plan(kind: str, value: float, scores: Scores | None = None, method: str = "ppl", **options):
    target = Target(kind, value)
    return make_plan_for(method, model="m", shape=SHAPE, target=target, scores=scores, unit="module", **options)


@given(st.data(), st.sampled_from(["ratio", "target-params"]), st.booleans())
def test_modules_go_by_damage_per_parameter_until_the_target(data: st.DataObject, kind: str, at_most: bool) -> None:
    attention, mlp = data.draw(scores_of(6)), data.draw(scores_of(6))
    assume(len(set(attention)) > 1 and len(set(mlp)) > 1)
    dense = data.draw(st.floats(-3, 3))
    protect = data.draw(st.tuples(st.integers(0, 2), st.integers(0, 2)))
    share = data.draw(st.integers(1, 99)) / 100
    value = share if kind == "ratio" else SHAPE.parameters - share * 6 * (MHA + FFN)
    try:
        made = plan(kind, value, by_module(attention, mlp, dense=dense), protect=protect, at_most=at_most)
    except InputError as error:
        assert "no module" in str(error) or "modules would go" in str(error)  # noqa: PT017 - the only refusals
        return
    free = set(removals.pieces(SHAPE, "module", protect))
    left = {piece for piece in removals.pieces(SHAPE, "module") if _kept(made.keep, piece)}
    gone = set(removals.pieces(SHAPE, "module")) - left
    assert gone <= free

    def damage(piece: Piece) -> float:
        return ((attention if piece.part == "attention" else mlp)[piece.block] - dense) / (
            MHA if piece.part == "attention" else FFN
        )

    assert all(damage(g) <= damage(s) for g in gone for s in left & free)
    removed, excess = SHAPE.parameters - shape_after(SHAPE, made.keep).parameters, share * 6 * (MHA + FFN)
    if kind == "ratio":
        assert abs(removed - excess) <= max(MHA, FFN) / 2 + 1
    elif at_most:
        assert excess - 1e-6 <= removed < excess + max(MHA, FFN)
    else:
        assert excess - max(MHA, FFN) < removed <= excess + 1e-6


def _kept(keep: tuple[BlockKeep, ...], piece: Piece) -> bool:
    return any(
        one.index == piece.block and (one.kv_groups if piece.part == "attention" else one.neurons) != "" for one in keep
    )


def test_cost_decides_between_equal_damages_and_empty_blocks_go_whole() -> None:
    assert FFN > MHA
    scores = by_module((2.0, 3.0, 9, 9, 9, 9), (2.0, 9, 9, 9, 9, 9.5), dense=1.0)
    first = plan("target-params", SHAPE.parameters - FFN, scores)
    assert first.keep == (BlockKeep(0, neurons=""), *map(BlockKeep, range(1, 6)))
    assert first.method == "ppl (modules)"
    second = plan("target-params", SHAPE.parameters - FFN - MHA, scores)
    assert [keep.index for keep in second.keep] == [1, 2, 3, 4, 5]
    assert shape_after(SHAPE, second.keep).parameters == SHAPE.parameters - FFN - MHA


def test_blind_plans_by_module_have_the_right_size() -> None:
    made = plan("ratio", 0.25)
    assert made.blind
    total = 6 * (MHA + FFN)
    assert abs(SHAPE.parameters - shape_after(SHAPE, made.keep).parameters - total / 4) <= FFN / 2


@pytest.mark.parametrize(
    ("call", "problem"),
    [
        (lambda: plan("blocks", 2), "--blocks is not for ppl by module; use --ratio or --target-params"),
        (
            lambda: plan("ratio", 0.5, method="bi"),
            "--unit module is not for bi, which scores whole blocks; use one of mag",
        ),
        (lambda: plan("ratio", 0.5, method="mag-sp"), "--unit module is not for mag-sp, which removes heads"),
        (lambda: plan("ratio", 0.99), "12 of 12 modules would go, but only 11 may: one module must stay"),
        (lambda: plan("ratio", 0.001), "removes no module of 12; ask for more"),
        (lambda: plan("ratio", 0.5, by_module((1.0, 2, 3, 4, 5), (1.0,) * 6)), "for 5 blocks, this model has 6"),
        (lambda: plan("ratio", 0.5, by_module((1.0, 2, 3, 4, 5, None), (1.0, 2, 3, 4, 5, 6))), "scores.attention"),
        (
            lambda: plan("ratio", 0.5, msgspec.structs.replace(by_module(None, None), unit="block")),
            "scores are by block, method ppl needs them by module",
        ),
    ],
)
def test_bad_requests_by_module_are_refused(call, problem: str) -> None:
    with pytest.raises((InputError, PlanError)) as error:
        call()
    assert problem in str(error.value)
    assert "\n" not in str(error.value)


# -- the cut and its uncertainty --------------------------------------------------------------------------------------


def with_intervals(values, half: float) -> Scores:
    interval = [[value - half, value + half] for value in values]
    details = {"dense": 1.0, "interval": interval, "sequence_tokens": [8] * 5}
    return Scores("ppl", "block", SHAPE.digest(), blocks=tuple(values), details=details)


@pytest.mark.parametrize(
    ("half", "blocks", "protect", "said"),
    [
        (0.5, 2, (0, 0), None),
        (1.5, 2, (0, 0), "ppl: 1 goes at 4, 2 stays at 5, and 5 sequences do not tell them apart; more --samples may"),
        (1.5, 3, (0, 0), None),
        (10.5, 3, (0, 0), "ppl: 2 goes at 5, 3 stays at 9"),
        (1.5, 3, (1, 0), "ppl: 3 goes at 9, 4 stays at 10"),
        (10.0, 5, (1, 0), None),
    ],
)
def test_a_cut_inside_an_interval_is_told(half: float, blocks: int, protect: tuple[int, int], said: str | None) -> None:
    scores = with_intervals((3.0, 4.0, 5.0, 9.0, 10.0, 30.0), half)
    made = make_plan_for("ppl", model="m", shape=SHAPE, target=Target("blocks", blocks), scores=scores, protect=protect)
    told = removals.doubt(scores, SHAPE, made.keep, protect)
    if said is None:
        assert told is None
    else:
        assert told is not None
        assert said in told
        assert "\n" not in told


def test_intervals_of_modules_are_compared_by_damage_per_parameter() -> None:
    attention, mlp = (2.0, 2.0 + 2 * MHA / FFN, 9, 9, 9, 9), (1.0 + 1.5 * FFN / MHA, 99, 99, 99, 99, 99)
    ends = {"attention": [[v - 0.1, v + 0.1] for v in attention], "mlp": [[v - 0.1, v + 0.1] for v in mlp]}
    details = {"dense": 1.0, "interval": ends, "sequence_tokens": [8] * 5}
    scores = msgspec.structs.replace(by_module(attention, mlp), details=details)
    made = plan("target-params", SHAPE.parameters - MHA, scores)
    assert made.keep[0] == BlockKeep(0, kv_groups="")
    assert removals.doubt(scores, SHAPE, made.keep, (0, 0)) is None
    wide = {part: [[low - 5, high + 5] for low, high in listed] for part, listed in ends.items()}
    unsure = msgspec.structs.replace(scores, details={**details, "interval": wide})
    assert "0.attention goes at 2" in str(removals.doubt(unsure, SHAPE, made.keep, (0, 0)))


def test_scores_without_intervals_raise_no_doubt() -> None:
    scores = with_intervals((3.0, 4.0, 5.0, 9.0, 10.0, 30.0), 100)
    keep = tuple(map(BlockKeep, range(1, 6)))
    assert removals.doubt(scores, SHAPE, keep, (0, 0)) is not None
    for change in ({"details": {"interval": None}}, {"details": None}, {"order": ("0",)}):
        assert removals.doubt(msgspec.structs.replace(scores, **change), SHAPE, keep, (0, 0)) is None
