from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import keeps, plan_of, shapes

from shortllama import files
from shortllama.difference import SetDifference, difference
from shortllama.errors import InputError, PlanError
from shortllama.indices import parse_indices
from shortllama.plans import (
    BlockKeep,
    Plan,
    Provenance,
    Target,
    block_keep,
    check_base,
    compose,
    kept_groups,
    kept_neurons,
    kept_queries,
    make_plan,
    read_plan,
    shape_after,
    write_plan,
)
from shortllama.shape import BlockShape, ModelShape


@pytest.fixture
def two_blocks() -> ModelShape:
    """Two blocks of 4 query heads in 2 groups, 6 neurons."""
    return ModelShape.uniform(vocabulary=5, hidden=8, head_dim=2, blocks=2, query_heads=4, kv_heads=2, neurons=6)


@given(st.data())
def test_a_plan_survives_json_byte_for_byte(data: st.DataObject) -> None:
    shape = data.draw(shapes())
    value = data.draw(st.one_of(st.integers(1, 9), st.floats(0.01, 0.99), st.text(max_size=5)))
    plan = make_plan(
        model="m",
        shape=shape,
        method="taylor+",
        target=Target("ratio", value),
        keep=data.draw(keeps(shape)),
        blind=data.draw(st.booleans()),
        provenance=Provenance("d", None, data.draw(st.none() | st.integers(0, 9))),
    )
    written = files.encode_json(plan)
    read = files.decode_json(written, Plan, "plan.json")
    assert read == plan
    assert files.encode_json(read) == written
    assert read.digest() == plan.digest()


def test_a_plan_file_is_found_in_its_checkpoint_folder(tmp_path: Path, two_blocks: ModelShape) -> None:
    plan = plan_of(two_blocks, (BlockKeep(1),))
    write_plan(tmp_path / "plan.json", plan)
    assert read_plan(tmp_path) == read_plan(tmp_path / "plan.json") == plan


def test_the_plan_file_reads_as_documented(two_blocks: ModelShape) -> None:
    """Golden: the format of a plan file, which other programs read."""
    plan = make_plan(
        model="tiny",
        shape=two_blocks,
        method="wanda-sp",
        target=Target("ratio", 0.5),
        keep=(BlockKeep(0, "1", "0,2-3"), BlockKeep(1, None, "")),
        provenance=Provenance("aa", "bb", 0),
    )
    assert msgspec.json.decode(files.encode_json(plan)) == {
        "schema": "shortllama.plan/1",
        "blind": False,
        "base": {"model": "tiny", "shape_digest": "6c7e47a9c1756604"},
        "method": "wanda-sp",
        "target": {"kind": "ratio", "value": 0.5},
        "achieved": {"parameters": 0.40404, "blocks": 2},
        "keep": [{"index": 0, "kv_groups": "1", "neurons": "0,2-3"}, {"index": 1, "kv_groups": None, "neurons": ""}],
        "compensation": None,
        "provenance": {"scores_digest": "aa", "calibration": "bb", "seed": 0},
    }


def test_query_heads_are_written_only_where_groups_are_cut(two_blocks: ModelShape) -> None:
    """Golden: the additive key. Plans without it keep their bytes, and with them their digests."""
    cut = plan_of(two_blocks, (BlockKeep(0, "1", None, "2"), BlockKeep(1, None, "1", "0,3")))
    assert msgspec.json.decode(files.encode_json(cut))["keep"] == [
        {"index": 0, "kv_groups": "1", "neurons": None, "queries": "2"},
        {"index": 1, "kv_groups": None, "neurons": "1", "queries": "0,3"},
    ]
    assert shape_after(two_blocks, cut.keep).blocks == (BlockShape(1, 1, 6), BlockShape(2, 2, 1))
    assert files.decode_json(files.encode_json(cut), Plan, "plan.json") == cut
    whole = plan_of(two_blocks, (BlockKeep(0, "1"), BlockKeep(1)))
    assert whole.digest() == "98554c067bea2b71"


def test_sizes_left_by_hand(two_blocks: ModelShape) -> None:
    after = shape_after(two_blocks, (BlockKeep(0, "1", "0,2-3"), BlockKeep(1, None, "")))
    assert after.blocks == (BlockShape(2, 1, 3), BlockShape(4, 2, 0))
    assert msgspec.structs.replace(after, blocks=two_blocks.blocks) == two_blocks


# A model as nested lists of labels: the independent way to apply a plan.
Labels = list[tuple[int, list[int], list[int], list[int]]]


def label(shape: ModelShape) -> Labels:
    return [
        (i, list(range(b.kv_heads)), list(range(b.neurons)), list(range(b.query_heads)))
        for i, b in enumerate(shape.blocks)
    ]


def apply_to_labels(labels: Labels, plan: Plan, shape: ModelShape) -> Labels:
    left: Labels = []
    for keep in plan.keep:
        original, groups, neurons, queries = labels[keep.index]
        block = shape.blocks[keep.index]
        left.append(
            (
                original,
                [groups[g] for g in kept_groups(keep, block)],
                [neurons[n] for n in kept_neurons(keep, block)],
                [queries[q] for q in kept_queries(keep, block)],
            )
        )
    return left


@given(st.data())
def test_every_query_head_left_reads_the_kv_head_that_it_read(data: st.DataObject) -> None:
    shape = data.draw(shapes())
    for keep in data.draw(keeps(shape)):
        before = shape.blocks[keep.index]
        after = shape_after(shape, (keep,)).blocks[0]
        groups, queries = kept_groups(keep, before), kept_queries(keep, before)
        assert (after.query_heads, after.kv_heads) == (len(queries), len(groups))
        size = before.query_heads // before.kv_heads
        for position, query in enumerate(queries):
            # transformers' repeat_kv: head j of a model reads KV head j // (H/K), before and after.
            assert groups[position // (after.query_heads // after.kv_heads)] == query // size


@settings(max_examples=150)
@given(st.data())
def test_composing_two_plans_equals_applying_them_in_turn(data: st.DataObject) -> None:
    shape = data.draw(shapes())
    first = plan_of(shape, data.draw(keeps(shape)))
    between = shape_after(shape, first.keep)
    second = plan_of(between, data.draw(keeps(between)))
    both = compose(first, second, shape)
    twice = apply_to_labels(apply_to_labels(label(shape), first, shape), second, between)
    assert apply_to_labels(label(shape), both, shape) == twice
    assert shape_after(shape, both.keep) == shape_after(between, second.keep)
    check_base(both, shape)


@given(st.data())
def test_composing_is_associative(data: st.DataObject) -> None:
    shape = data.draw(shapes())
    a = plan_of(shape, data.draw(keeps(shape)))
    after_a = shape_after(shape, a.keep)
    b = plan_of(after_a, data.draw(keeps(after_a)))
    after_b = shape_after(after_a, b.keep)
    c = plan_of(after_b, data.draw(keeps(after_b)))
    assert compose(compose(a, b, shape), c, shape).keep == compose(a, compose(b, c, after_a), shape).keep


@given(st.data())
def test_achieved_is_the_share_of_parameters_removed(data: st.DataObject) -> None:
    shape = data.draw(shapes())
    plan = plan_of(shape, data.draw(keeps(shape)))
    left = shape_after(shape, plan.keep).parameters
    assert plan.achieved.parameters == pytest.approx((shape.parameters - left) / shape.parameters, abs=1e-6)
    assert plan.achieved.blocks == len(plan.keep)


def test_composing_with_a_blind_plan_is_blind(two_blocks: ModelShape) -> None:
    blind = msgspec.structs.replace(plan_of(two_blocks, (BlockKeep(0), BlockKeep(1))), blind=True)
    real = plan_of(two_blocks, (BlockKeep(0),))
    assert compose(blind, real, two_blocks).blind


def test_compensated_plans_are_not_composed(two_blocks: ModelShape) -> None:
    plan = plan_of(two_blocks, (BlockKeep(0), BlockKeep(1)))
    with pytest.raises(PlanError, match="bias compensation cannot be composed"):
        compose(msgspec.structs.replace(plan, compensation="flap"), plan, two_blocks)


def test_a_plan_for_another_base_is_refused_with_both_digests(two_blocks: ModelShape) -> None:
    plan = plan_of(two_blocks, (BlockKeep(0),))
    other = shape_after(two_blocks, plan.keep)
    with pytest.raises(PlanError) as caught:
        check_base(plan, other)
    assert f"m@{two_blocks.digest()}" in str(caught.value)
    assert other.digest() in str(caught.value)
    with pytest.raises(PlanError):
        compose(plan, plan, two_blocks)


@pytest.mark.parametrize(
    ("keep", "problem"),
    [
        ((), "at least one block"),
        ((BlockKeep(2),), "block 2 after block -1"),
        ((BlockKeep(1), BlockKeep(0)), "block 0 after block 1"),
        ((BlockKeep(0), BlockKeep(0)), "block 0 after block 0"),
        ((BlockKeep(0, "0-2"),), "2 is out of range"),
        ((BlockKeep(0, None, "6"),), "6 is out of range"),
        ((BlockKeep(0, "1,0"),), "does not ascend"),
        ((BlockKeep(0, None, None, "4"),), "4 is out of range"),
        ((BlockKeep(0, None, None, "0-2"),), "2 of group 0, 1 of group 1; every KV group kept \\(0-1\\) must keep as"),
        ((BlockKeep(0, None, None, "0-1"),), "2 of group 0, 0 of group 1"),
        ((BlockKeep(0, "1", None, "0"),), "1 of group 0, 0 of group 1; every KV group kept \\(1\\)"),
        ((BlockKeep(0, "1", None, ""),), "0 of group 1"),
        ((BlockKeep(0, "", None, "0"),), "1 of group 0; every KV group kept \\(none\\)"),
        ((BlockKeep(0, "", None, ""),), "which are none"),
    ],
)
def test_impossible_keeps_are_refused(two_blocks: ModelShape, keep: tuple[BlockKeep, ...], problem: str) -> None:
    with pytest.raises(PlanError, match=problem):
        plan_of(two_blocks, keep)


def test_keeping_everything_is_written_as_null(two_blocks: ModelShape) -> None:
    assert block_keep(1, two_blocks.blocks[1], (0, 1), tuple(range(6))) == BlockKeep(1)
    assert block_keep(1, two_blocks.blocks[1], (), (2,)) == BlockKeep(1, "", "2")
    assert block_keep(1, two_blocks.blocks[1], (1,), (2,), (2, 3)) == BlockKeep(1, "1", "2")
    assert block_keep(1, two_blocks.blocks[1], (1,), (2,), (3,)) == BlockKeep(1, "1", "2", "3")


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda plan: plan | {"kepp": []}, r"unknown key \$\.kepp; did you mean 'keep'\?"),
        (lambda plan: plan | {"schema": "shortllama.plan/9"}, r"\$\.schema.*'shortllama.plan/9'"),
        (lambda plan: plan | {"keep": [{"index": "a"}]}, r"\$\.keep\[0\]\.index.*saw 'a'"),
        (lambda plan: {key: value for key, value in plan.items() if key != "base"}, "base"),
    ],
)
def test_a_broken_plan_file_is_refused_by_key(tmp_path: Path, two_blocks: ModelShape, change, problem: str) -> None:
    plan = msgspec.json.decode(files.encode_json(plan_of(two_blocks, (BlockKeep(0),))))
    path = tmp_path / "plan.json"
    path.write_bytes(msgspec.json.encode(change(plan)))
    with pytest.raises(InputError, match=problem) as caught:
        read_plan(path)
    assert str(path) in str(caught.value)


# -- differences inside blocks ----------------------------------------------------------------------------------------


@settings(max_examples=150)
@given(st.data())
def test_the_difference_of_query_heads_is_that_of_the_sets(data: st.DataObject) -> None:
    shape = data.draw(shapes(min_blocks=1, max_blocks=1))
    block, (a, b) = shape.blocks[0], (plan_of(shape, data.draw(keeps(shape))) for _ in range(2))
    found = difference(a, b)
    one, two = (set(kept_queries(plan.keep[0], block)) for plan in (a, b))
    parts = found.inside[0] if found.inside else None
    if parts is None or parts.queries is None:
        # Told by the groups alone, or equal.
        assert one == two or (a.keep[0].queries is b.keep[0].queries is msgspec.UNSET and found.inside)
        return
    for text, (mine, others), keep in (
        (parts.queries.only_a, (one, two), a.keep[0]),
        (parts.queries.only_b, (two, one), b.keep[0]),
    ):
        assert named(text, set(kept_queries(keep, block)), block) == mine - others
    assert not found.equal


def named(text: str, all_of_its_groups: set[int], block: BlockShape) -> set[int]:
    """The query heads that a difference's text names."""
    if text.startswith("all of its groups but "):
        return all_of_its_groups - set(parse_indices(text.removeprefix("all of its groups but "), block.query_heads))
    heads, outside, groups = text.partition(" outside KV groups ")
    left = set(parse_indices(heads, block.query_heads))
    inside = parse_indices(groups, block.kv_heads) if outside else ()
    return {head for head in left if head // block.queries_per_group not in inside}


def test_a_difference_says_which_heads_only_one_keeps(two_blocks: ModelShape) -> None:
    a = plan_of(two_blocks, (BlockKeep(0, None, None, "0,2"), BlockKeep(1, None, None, "1,2")))
    b = plan_of(two_blocks, (BlockKeep(0), BlockKeep(1, "1", None, "3")))
    first, second = difference(a, b).inside
    assert first.queries == SetDifference("", "all of its groups but 0,2")
    assert first.kv_groups is None
    assert second.queries == SetDifference("1-2", "3")
    assert second.kv_groups == SetDifference("all but 1", "")
