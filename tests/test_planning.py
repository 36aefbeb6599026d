from __future__ import annotations

import math
from typing import Any

import msgspec
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from strategies import scores_of, shapes

from shortllama import catalogue, methods
from shortllama.errors import InputError, PlanError
from shortllama.methods import METHODS
from shortllama.planning import make_plan_for, remark
from shortllama.plans import BlockKeep, Plan, Target, check_base, kept_groups, kept_neurons, shape_after
from shortllama.scores import Scores
from shortllama.selection import candidates
from shortllama.shape import ModelShape

RUN_METHODS = sorted(name for name, row in METHODS.items() if row.choice == "run")
DEPTH = sorted(name for name, row in METHODS.items() if row.unit == "block")
# Those that take the same share of every block; tests/test_width_rules.py has the others.
WIDTH = ["mag-sp", "wanda-sp"]
LLAMA_7B, LLAMA_13B = catalogue.lookup("llama-7b"), catalogue.lookup("llama-13b")

# LLM-Pruner's parameters at the paper's three ratios, and the blocks that the paper's depth models keep.
LLM_PRUNER_SIZES = [
    ("llama-7b", 5_422_977_024, 26),
    ("llama-7b", 4_907_642_880, 23),
    ("llama-7b", 4_392_308_736, 21),
    ("llama-13b", 10_319_713_280, 32),
    ("llama-13b", 9_240_939_520, 29),
    ("llama-13b", 8_162_688_000, 25),
]


def plan(method: str, shape: ModelShape, kind: str, value: float, **options: Any) -> Plan:
    return make_plan_for(method, model="m", shape=shape, target=Target(kind, value), **options)


def left(made: Plan, shape: ModelShape) -> int:
    """Parameters of what a plan leaves."""
    return shape_after(shape, made.keep).parameters


@st.composite
def scored(draw: st.DrawFn, names: list[str], **limits: int) -> tuple[str, ModelShape, Scores]:
    """A method, a shape, and scores that fit both."""
    name = draw(st.sampled_from(names))
    shape = draw(shapes(**limits))
    row = METHODS[name]
    scores = Scores(criterion=row.criterion, unit=row.unit, base_digest=shape.digest(), calibration={"digest": "c"})
    if row.unit == "block":
        values = draw(scores_of(len(shape.blocks)))
        assume(len(shape.blocks) == 1 or len(set(values)) > 1)
        count = len(shape.blocks)
        runs = {str(n): draw(scores_of(count - n + 1)) for n in range(2, count + 1)} if row.choice == "run" else {}
        return name, shape, msgspec.structs.replace(scores, blocks=values, runs={"1": values, **runs} if runs else None)
    groups = tuple(draw(scores_of(block.kv_heads)) for block in shape.blocks)
    neurons = tuple(draw(scores_of(block.neurons)) for block in shape.blocks)
    return name, shape, msgspec.structs.replace(scores, kv_groups=groups, neurons=neurons)


# -- depth ----------------------------------------------------------------------------------------------------------


@given(st.data(), st.booleans())
def test_depth_removes_the_lowest_unprotected_blocks_and_as_many_as_asked(data: st.DataObject, real: bool) -> None:
    name, shape, scores = data.draw(scored(DEPTH, min_blocks=2, max_blocks=14))
    protect = data.draw(st.none() | st.tuples(st.integers(0, 3), st.integers(0, 3)))
    protected = METHODS[name].protect if protect is None else protect
    free = candidates(len(shape.blocks), protected)
    removable = min(len(free), len(shape.blocks) - 1)
    assume(removable)
    count = data.draw(st.integers(1, removable))
    made = plan(name, shape, "blocks", count, scores=scores if real else None, protect=protect)
    gone = set(range(len(shape.blocks))) - {keep.index for keep in made.keep}
    assert len(gone) == count
    assert gone <= set(free)
    assert made.blind is not real
    assert all(keep == BlockKeep(keep.index) for keep in made.keep)
    if real and METHODS[name].choice == "ranked":
        assert scores.blocks is not None
        stay = set(free) - gone
        assert all(scores.blocks[g] <= scores.blocks[s] for g in gone for s in stay)
    check_base(made, shape)


@given(st.data())
def test_a_run_is_contiguous_unprotected_and_scores_lowest_of_its_length(data: st.DataObject) -> None:
    name, shape, scores = data.draw(scored(RUN_METHODS, min_blocks=2, max_blocks=10))
    protect = data.draw(st.tuples(st.integers(0, 3), st.integers(0, 3)))
    blocks = len(shape.blocks)
    removable = min(len(candidates(blocks, protect)), blocks - 1)
    assume(removable > 0)
    count = data.draw(st.integers(1, removable))
    made = plan(name, shape, "blocks", count, scores=scores, protect=protect)
    gone = sorted(set(range(blocks)) - {keep.index for keep in made.keep})
    assert gone == list(range(gone[0], gone[0] + count))
    distances = (scores.runs or {})[str(count)]
    allowed = [s for s in range(blocks - count + 1) if s >= protect[0] and blocks - (s + count) >= protect[1]]
    assert gone[0] in allowed
    assert distances[gone[0]] == min(distances[start] for start in allowed)


def test_a_run_meets_target_params_by_blocks_of_one_size() -> None:
    shape = msgspec.structs.replace(LLAMA_7B, blocks=LLAMA_7B.blocks[:6])
    runs = {str(n): tuple(float((s * 7 + n) % 5) for s in range(7 - n)) for n in range(1, 7)}
    scores = Scores("angular", "block", shape.digest(), blocks=runs["1"], runs=runs)
    block = shape.block_parameters(shape.blocks[0])
    for at_most, left_over in ((False, 4), (True, 3)):
        made = plan("angular", shape, "target-params", shape.parameters - 2.5 * block, scores=scores, at_most=at_most)
        assert made.achieved.blocks == left_over
    with pytest.raises(PlanError, match="6 of 6 blocks would go, but only 5 may"):
        plan("angular", shape, "target-params", 1000, scores=scores, at_most=True)
    with pytest.raises(InputError, match="lack 'runs' of every length"):
        plan("angular", shape, "blocks", 2, scores=msgspec.structs.replace(scores, runs={"1": runs["1"]}))


@given(st.data())
def test_removing_more_blocks_never_brings_one_back(data: st.DataObject) -> None:
    name, shape, scores = data.draw(scored(["mag", "ppl", "bi"], min_blocks=3, max_blocks=14))
    few = data.draw(st.integers(1, len(shape.blocks) - 2))
    more = data.draw(st.integers(few, len(shape.blocks) - 1))
    smaller, larger = (plan(name, shape, "blocks", n, scores=scores) for n in (few, more))
    assert set(larger.keep) <= set(smaller.keep)


@given(shapes(uniform=True, min_blocks=2, max_blocks=40), st.integers(1, 99))
def test_a_ratio_is_hit_within_half_a_block(shape: ModelShape, percent: int) -> None:
    blocks = len(shape.blocks)
    assume(0.5 <= percent * blocks / 100 < blocks - 0.5)
    removed = blocks - len(plan("ppl", shape, "ratio", percent / 100).keep)
    assert -0.5 < removed - percent * blocks / 100 <= 0.5 + 1e-9


def test_the_plus_methods_protect_four_and_two() -> None:
    shape = msgspec.structs.replace(LLAMA_7B, blocks=LLAMA_7B.blocks[:12])
    scores = Scores(criterion="taylor", unit="block", base_digest=shape.digest(), blocks=tuple(map(float, range(12))))
    plain, plus = (plan(name, shape, "blocks", 3, scores=scores) for name in ("taylor", "taylor+"))
    assert [keep.index for keep in plain.keep] == [3, 4, 5, 6, 7, 8, 9, 10, 11]
    assert [keep.index for keep in plus.keep] == [0, 1, 2, 3, 7, 8, 9, 10, 11]
    assert plan("taylor+", shape, "blocks", 3, scores=scores, protect=(0, 0)).keep == plain.keep
    assert {name: row.protect for name, row in METHODS.items() if row.protect != (0, 0)} == {
        "mag+": (4, 2),
        "taylor+": (4, 2),
        "llm-pruner": (4, 2),
    }


@pytest.mark.parametrize(("model", "parameters", "blocks"), LLM_PRUNER_SIZES)
def test_the_papers_block_counts_follow_from_llm_pruners_sizes(model: str, parameters: int, blocks: int) -> None:
    shape = catalogue.lookup(model)
    for method in ("ppl", "taylor+"):
        over = plan(method, shape, "target-params", parameters)
        under = plan(method, shape, "target-params", parameters, at_most=True)
        assert over.achieved.blocks == blocks
        assert under.achieved.blocks == blocks - 1
        assert shape_after(shape, under.keep).parameters <= parameters < shape_after(shape, over.keep).parameters
        assert "--at-most" in str(remark(over, shape))
        assert remark(under, shape) is None


def test_a_target_met_exactly_needs_no_remark() -> None:
    parameters = catalogue.lookup("llama-7b/depth-26").parameters
    for at_most in (False, True):
        made = plan("ppl", LLAMA_7B, "target-params", parameters, at_most=at_most)
        assert made.achieved.blocks == 26
        assert remark(made, LLAMA_7B) is None


@given(st.data(), st.booleans())
def test_target_params_removes_the_number_of_blocks_that_brute_force_finds(data: st.DataObject, at_most: bool) -> None:
    name, shape, scores = data.draw(scored(["mag", "bi"], min_blocks=2))
    wanted = data.draw(st.integers(1, shape.parameters - 1))
    removable = len(shape.blocks) - 1
    sizes = {n: left(plan(name, shape, "blocks", n, scores=scores), shape) for n in range(1, removable + 1)}
    if at_most:
        expected = min((n for n, size in sizes.items() if size <= wanted), default=None)
    else:
        # One block more would go below what is asked; that block may be the last, which must stay.
        all_gone = shape.parameters - sum(map(shape.block_parameters, shape.blocks))
        expected = max((n for n, size in sizes.items() if size >= wanted > all_gone), default=None)
    if expected is None:
        with pytest.raises(InputError):
            plan(name, shape, "target-params", wanted, scores=scores, at_most=at_most)
    else:
        made = plan(name, shape, "target-params", wanted, scores=scores, at_most=at_most)
        assert left(made, shape) == sizes[expected]


# -- width ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", WIDTH)
@pytest.mark.parametrize(
    ("row", "ratio"),
    [
        ("llama-7b/wanda-sp-20", 0.20),
        ("llama-7b/wanda-sp-27", 0.29),
        ("llama-7b/wanda-sp-35", 0.35),
        ("llama-13b/wanda-sp-21", 0.20),
        ("llama-13b/wanda-sp-29", 0.28),
        ("llama-13b/wanda-sp-37", 0.37),
    ],
)
def test_the_papers_ratios_give_table_1s_shapes(method: str, row: str, ratio: float) -> None:
    shape = catalogue.lookup(row.partition("/")[0])
    assert shape_after(shape, plan(method, shape, "ratio", ratio).keep) == catalogue.lookup(row)


@given(st.data(), st.floats(0.01, 0.99), st.sampled_from([1, 2, 3, 4, 8]))
def test_width_keeps_the_best_units_of_every_block(data: st.DataObject, ratio: float, align: int) -> None:
    name, shape, scores = data.draw(scored(WIDTH))
    protect = data.draw(st.tuples(st.integers(0, 2), st.integers(0, 2)))
    assume(candidates(len(shape.blocks), protect))
    try:
        made = plan(name, shape, "ratio", ratio, scores=scores, protect=protect, align=align)
    except InputError as error:
        assert "removes no KV group" in str(error)  # noqa: PT017 - the only refusal there may be
        return
    assert scores.kv_groups is not None
    assert scores.neurons is not None
    for keep in made.keep:
        block = shape.blocks[keep.index]
        if keep.index not in candidates(len(shape.blocks), protect):
            assert keep == BlockKeep(keep.index)
            continue
        for kept, values, unit in (
            (kept_groups(keep, block), scores.kv_groups[keep.index], align // math.gcd(align, shape.head_dim)),
            (kept_neurons(keep, block), scores.neurons[keep.index], align),
        ):
            least = len(values) - int(ratio * len(values))
            assert least <= len(kept) < least + unit
            assert len(kept) % unit == 0 or len(kept) == len(values)
            gone = set(range(len(values))) - set(kept)
            assert all(values[g] <= values[k] for g in gone for k in kept)


@given(shapes(), st.floats(0.01, 0.99), st.floats(0.01, 0.99))
def test_a_higher_ratio_never_keeps_more(shape: ModelShape, one: float, other: float) -> None:
    def kept(ratio: float) -> tuple[BlockKeep, ...]:
        try:
            return plan("mag-sp", shape, "ratio", ratio).keep
        except InputError:  # too low to remove anything
            return tuple(map(BlockKeep, range(len(shape.blocks))))

    for few, many in zip(kept(max(one, other)), kept(min(one, other)), strict=True):
        block = shape.blocks[few.index]
        assert set(kept_groups(few, block)) <= set(kept_groups(many, block))
        assert set(kept_neurons(few, block)) <= set(kept_neurons(many, block))


@settings(max_examples=60)
@given(shapes(), st.booleans(), st.data())
def test_width_meets_target_params_within_one_step(shape: ModelShape, at_most: bool, data: st.DataObject) -> None:
    wanted = data.draw(st.integers(1, shape.parameters - 1))
    # Brute force over every ratio at which some count changes.
    sizes = {block.kv_heads for block in shape.blocks} | {block.neurons for block in shape.blocks}
    steps = {k / size + 1e-9 for size in sizes for k in range(1, size)}
    reachable = {left(plan("wanda-sp", shape, "ratio", ratio), shape) for ratio in steps}
    if at_most:
        best = max((p for p in reachable if p <= wanted), default=None)
    else:
        best = min((p for p in reachable if p >= wanted >= min(reachable)), default=None)
    if best is None:
        with pytest.raises(InputError):
            plan("wanda-sp", shape, "target-params", wanted, at_most=at_most)
    else:
        assert left(plan("wanda-sp", shape, "target-params", wanted, at_most=at_most), shape) == best


def test_aligned_neurons_and_heads_of_llama_7b() -> None:
    shape = shape_after(LLAMA_7B, plan("wanda-sp", LLAMA_7B, "ratio", 0.2, align=64).keep)
    assert shape.blocks[0].neurons == 8832  # 8807 up to a multiple of 64
    assert shape.blocks[0].kv_heads == 26  # 26 x 128 is a multiple of 64 already
    wide = shape_after(LLAMA_7B, plan("wanda-sp", LLAMA_7B, "ratio", 0.2, align=512).keep)
    assert wide.blocks[0].kv_heads == 28  # 4 heads of 128 make 512


# -- provenance and refusals ----------------------------------------------------------------------------------------


@given(st.data())
def test_a_real_plan_says_where_it_comes_from_and_equal_inputs_give_equal_bytes(data: st.DataObject) -> None:
    name, shape, scores = data.draw(scored([*DEPTH, *WIDTH], min_blocks=8, max_blocks=8))
    try:
        one, two = (plan(name, shape, "ratio", 0.3, scores=scores, seed=7) for _ in range(2))
    except InputError:
        return
    assert one.digest() == two.digest()
    assert one.provenance.scores_digest == scores.digest()
    assert (one.provenance.calibration, one.provenance.seed) == ("c", 7)
    assert one.method == name
    assert not one.blind


def test_methods_have_aliases_and_near_names() -> None:
    assert methods.lookup("sequential") is METHODS["last"]
    assert all(name == row.name for name, row in METHODS.items())
    with pytest.raises(InputError, match=r"'tailor\+' is unknown; did you mean taylor\+"):
        methods.lookup("tailor+")
    with pytest.raises(InputError, match="choose one of mag, mag"):
        methods.lookup("xyz")


@pytest.mark.parametrize(
    ("method", "kind", "value", "options", "problem"),
    [
        ("mag", "ratio", 0.0, {}, "--ratio 0 is outside (0, 1)"),
        ("mag", "ratio", 1.0, {}, "--ratio 1 is outside (0, 1)"),
        ("wanda-sp", "ratio", -0.2, {}, "--ratio -0.2 is outside (0, 1)"),
        ("mag", "ratio", math.nan, {}, "--ratio nan is outside (0, 1)"),
        ("mag", "ratio", 0.001, {}, "--ratio 0.001 removes no block of 32"),
        ("mag", "ratio", 0.99, {}, "32 of 32 blocks would go, but only 31 may: one block must stay"),
        ("taylor+", "ratio", 0.9, {}, "29 of 32 blocks would go, but only 26 may: the first 4 and last 2"),
        ("taylor+", "blocks", 27, {}, "27 of 32 blocks would go, but only 26 may"),
        ("mag", "blocks", 9, {"protect": (12, 12)}, "9 of 32 blocks would go, but only 8 may"),
        ("mag", "blocks", 1, {"protect": (16, 16)}, "--protect 16,16 leaves none of the 32 blocks"),
        ("mag", "blocks", 1, {"protect": (-1, 0)}, "must not be negative"),
        ("mag", "blocks", 0, {}, "--blocks 0: give how many"),
        ("mag", "blocks", 1.5, {}, "--blocks 1.5: give how many"),
        ("wanda-sp", "blocks", 3, {}, "--blocks is not for wanda-sp; use --ratio or --target-params"),
        ("mag", "target-params", 7e9, {}, "--target-params 7e+09 is not between 0 and the model's 6738415616"),
        ("mag", "target-params", 6.7e9, {}, "removes no block of 32"),
        ("taylor+", "target-params", 1e9, {}, "28 of 32 blocks would go, but only 26 may"),
        ("wanda-sp", "target-params", 1e8, {}, "cannot be reached by wanda-sp: at least"),
        ("mag", "ratio", 0.2, {"align": 64}, "--align is for width methods; mag removes whole blocks"),
        ("wanda-sp", "ratio", 0.2, {"align": 0}, "--align 0: give a positive multiple"),
        ("wanda-sp", "ratio", 0.01, {"align": 4096}, "removes no KV group and no neuron once aligned"),
        ("wonda-sp", "ratio", 0.2, {}, "did you mean wanda-sp"),
    ],
)
def test_bad_requests_are_refused_with_the_numbers(
    method: str, kind: str, value: float, options: dict[str, Any], problem: str
) -> None:
    with pytest.raises(InputError) as caught:
        plan(method, LLAMA_7B, kind, value, **options)
    assert problem in str(caught.value)
    assert "\n" not in str(caught.value)


THREE_BLOCKS = ModelShape.uniform(vocabulary=5, hidden=8, head_dim=2, blocks=3, query_heads=4, kv_heads=2, neurons=4)
BLOCK_SCORES = Scores(criterion="ppl", unit="block", base_digest=THREE_BLOCKS.digest(), blocks=(1.0, 2.0, 3.0))
WIDTH_SCORES = Scores(
    criterion="wanda-sp",
    unit="width",
    base_digest=THREE_BLOCKS.digest(),
    kv_groups=((1.0, 2.0),) * 3,
    neurons=((1.0,) * 4,) * 3,
)


@pytest.mark.parametrize(
    ("method", "scores", "problem"),
    [
        ("mag", BLOCK_SCORES, "of criterion 'ppl', method mag needs 'mag'"),
        ("ppl", msgspec.structs.replace(BLOCK_SCORES, unit="module"), "by module, method ppl needs them by block"),
        ("ppl", msgspec.structs.replace(BLOCK_SCORES, blocks=(1.0, 2.0)), "for 2 blocks, this model has 3 blocks"),
        ("ppl", msgspec.structs.replace(BLOCK_SCORES, blocks=None), "lack 'blocks'"),
        ("ppl", msgspec.structs.replace(BLOCK_SCORES, blocks=(1.0, 2.0, math.nan)), "scores.blocks[2] is nan"),
        ("ppl", msgspec.structs.replace(BLOCK_SCORES, blocks=(1.0, 1.0, 1.0)), "ranks nothing"),
        ("ppl", msgspec.structs.replace(BLOCK_SCORES, base_digest="abc"), "of another model (shape abc"),
        ("wanda-sp", msgspec.structs.replace(WIDTH_SCORES, neurons=None), "lack 'neurons'"),
        (
            "wanda-sp",
            msgspec.structs.replace(WIDTH_SCORES, neurons=((1.0,) * 5,) * 3),
            "for 3 blocks of 5 units, this model has 3 blocks of 4 units",
        ),
    ],
)
def test_scores_that_do_not_fit_are_refused(method: str, scores: Scores, problem: str) -> None:
    with pytest.raises(InputError) as caught:
        plan(method, THREE_BLOCKS, "ratio", 0.5, scores=scores)
    assert problem in str(caught.value)


def test_errors_that_are_about_the_model_are_plan_errors() -> None:
    with pytest.raises(PlanError):
        plan("mag", LLAMA_13B, "blocks", 40)
