from __future__ import annotations

import random
import statistics

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from strategies import shapes

from shortllama import blind, catalogue
from shortllama.errors import InputError, PlanError
from shortllama.planning import make_plan_for
from shortllama.plans import BlockKeep, Plan, Target, check_base, shape_after
from shortllama.shape import BlockShape, ModelShape

LLAMA = catalogue.lookup("llama-7b")
GROUPED = catalogue.lookup("llama-3-8b")


def parse(text: str, shape: ModelShape = LLAMA, seed: int = 0) -> Plan:
    return blind.parse(text, model="m", shape=shape, seed=seed)


@given(shapes(), st.data())
def test_depth_leaves_as_many_blocks_as_it_says(shape: ModelShape, data: st.DataObject) -> None:
    count = data.draw(st.integers(1, len(shape.blocks)))
    plan = parse(f"depth:{count}", shape)
    assert len(shape_after(shape, plan.keep).blocks) == count
    assert plan.blind
    check_base(plan, shape)


@given(shapes(uniform=True), st.data())
def test_width_leaves_the_sizes_it_says_in_its_range_only(shape: ModelShape, data: st.DataObject) -> None:
    whole = shape.blocks[0]
    per_group = whole.query_heads // whole.kv_heads
    groups, neurons = data.draw(st.integers(0, whole.kv_heads)), data.draw(st.integers(0, whole.neurons))
    first = data.draw(st.integers(0, len(shape.blocks) - 1))
    end = data.draw(st.integers(first + 1, len(shape.blocks)))
    assume(groups or neurons)
    after = shape_after(shape, parse(f"width:{groups}x{neurons}@{first}-{end}", shape).keep).blocks
    assert set(after[first:end]) == {BlockShape(groups * per_group, groups, neurons)}
    assert {*after[:first], *after[end:]} <= {whole}


def test_width_counts_kv_groups() -> None:
    after = shape_after(GROUPED, parse("width:6x8192", GROUPED).keep)
    assert set(after.blocks) == {BlockShape(24, 6, 8192)}


def test_width_counts_query_heads_in_groups() -> None:
    plan = parse("width:24:8x14336", GROUPED)
    assert set(shape_after(GROUPED, plan.keep).blocks) == {BlockShape(24, 8, 14336)}
    assert plan.keep[3] == BlockKeep(3, None, None, "0-2,4-6,8-10,12-14,16-18,20-22,24-26,28-30")
    both = shape_after(GROUPED, parse("width:6:6x8192@4-30", GROUPED).keep)
    assert set(both.blocks[4:30]) == {BlockShape(6, 6, 8192)}
    assert set(both.blocks[:4] + both.blocks[30:]) == set(GROUPED.blocks)
    assert parse("width:24:6x8192", GROUPED).keep == parse("width:6x8192", GROUPED).keep
    assert catalogue.lookup("llama-3-8b/width:24:8x14336").blocks[0] == BlockShape(24, 8, 14336)


@given(shapes(uniform=True), st.data())
def test_width_with_query_heads_leaves_the_sizes_it_says(shape: ModelShape, data: st.DataObject) -> None:
    whole = shape.blocks[0]
    groups = data.draw(st.integers(1, whole.kv_heads))
    queries = groups * data.draw(st.integers(1, whole.query_heads // whole.kv_heads))
    after = shape_after(shape, parse(f"width:{queries}:{groups}x{whole.neurons}", shape).keep)
    assert set(after.blocks) == {BlockShape(queries, groups, whole.neurons)}


@pytest.mark.parametrize("text", ["width:23:8x9", "width:33:8x9", "width:0:8x9", "width:40:8x9", "width:8:0x9"])
def test_query_heads_that_groups_cannot_share_are_refused(text: str) -> None:
    with pytest.raises(
        PlanError, match=r"query heads cannot stay in \d KV groups of block 0; every group keeps as many"
    ):
        parse(text, GROUPED)


def test_a_method_with_a_ratio_is_what_that_method_removes() -> None:
    for text, method, ratio in (
        ("wanda-sp:0.2", "wanda-sp", 0.2),
        ("ppl:.25", "ppl", 0.25),
        ("taylor+:0.2", "taylor+", 0.2),
    ):
        assert parse(text) == make_plan_for(method, model="m", shape=LLAMA, target=Target("ratio", ratio))
    assert parse("sequential:0.5").method == "last"
    assert [keep.index for keep in parse("taylor+:0.75").keep] == [0, 1, 2, 3, 4, 5, 30, 31]


def test_flap_depends_on_its_seed_alone() -> None:
    text = "flap:26.9±7.5x8577±2078"
    one, again, other = parse(text), parse(text), parse(text, seed=1)
    assert one.digest() == again.digest()
    assert one.keep != other.keep
    assert (one.provenance.seed, other.provenance.seed) == (0, 1)
    assert one.achieved == other.achieved  # the sums are fixed, so the parameters are
    assert parse("flap:26.9+-7.5x8577+-2078") == one
    assert parse("depth:26", seed=5) == parse("depth:26")


@settings(max_examples=60)
@given(st.integers(2, 48), st.integers(1, 2000), st.floats(0.05, 0.95), st.floats(0.05, 0.7), st.integers(0, 9))
def test_spread_hits_sum_bounds_and_deviation(blocks: int, largest: int, level: float, share: float, seed: int) -> None:
    mean = 1 + level * (largest - 1)
    # Of the largest deviation there is between the bounds, which all values at one bound or the other reach.
    deviation = share * ((largest - mean) * (mean - 1)) ** 0.5
    try:
        counts = blind.spread(mean, deviation, [largest] * blocks, random.Random(seed), "neurons")
    except PlanError:
        assert blocks < 12  # few blocks cannot meet every deviation with a fixed sum
        return
    assert sum(counts) == round(mean * blocks)
    assert 1 <= min(counts) <= max(counts) <= largest
    if blocks >= 12 and deviation >= 1:  # less leaves hardly a choice once the sum is fixed
        # Between whole numbers of one sum, the sum of squares moves in steps of 2.
        grain = 2 / blocks
        assert statistics.pvariance(counts) <= deviation**2 + grain
        assert statistics.variance(counts) >= deviation**2 - grain * blocks / (blocks - 1)


@given(st.lists(st.integers(1, 40), min_size=1, max_size=20), st.data())
def test_spread_respects_each_blocks_own_size(largest: list[int], data: st.DataObject) -> None:
    total = data.draw(st.integers(len(largest), sum(largest)))
    # Blocks of different sizes cannot meet every deviation; no more than the bounds force is always possible.
    forced = max(largest) - min(largest)
    try:
        counts = blind.spread(total / len(largest), forced / 2, largest, random.Random(0), "neurons")
    except PlanError as error:
        assert "the nearest deviation that" in str(error)  # noqa: PT017 - nothing else may be wrong here
        return
    assert sum(counts) == total
    assert all(1 <= count <= top for count, top in zip(counts, largest, strict=True))


def test_a_width_beyond_the_groups_of_a_model_says_how_many_heads_they_hold() -> None:
    with pytest.raises(PlanError, match="block 0 has 8 KV groups of 4 query heads, not 24"):
        parse("width:24x8256", GROUPED)


@pytest.mark.parametrize(
    ("name", "names"),
    [
        ("llama-7b/depth:16..18", ("llama-7b/depth:16", "llama-7b/depth:17", "llama-7b/depth:18")),
        ("depth:3..3", ("depth:3",)),
        ("./folder/depth:1..2", ("./folder/depth:1", "./folder/depth:2")),
        ("llama-7b/depth:16", ("llama-7b/depth:16",)),
        ("llama-7b", ("llama-7b",)),
        ("../in-depth", ("../in-depth",)),
    ],
)
def test_ranges_expand(name: str, names: tuple[str, ...]) -> None:
    assert blind.expand(name) == names


def test_a_range_that_runs_down_is_refused() -> None:
    with pytest.raises(InputError, match=r"from 9 down to 3; write 3\.\.9"):
        blind.expand("llama-7b/depth:9..3")


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("depth:33", "between 1 and 32 blocks"),
        ("depth:0", "between 1 and 32 blocks"),
        ("depth:-1", "write depth:26"),
        ("dept:26", "method 'dept' is unknown"),
        ("depth", "write depth:26"),
        ("depth:1..3", "write depth:26"),
        ("width:24", "write depth:26"),
        ("width:33x8256", "block 0 has 32 heads, not 33"),
        ("width:24x11009@4-30", "block 4 has 11008 neurons, not 11009"),
        ("width:24x8256@30-4", "blocks 30 to 4"),
        ("width:24x8256@4-33", "no range of this model's 32"),
        ("width:0x0", "leaves nothing of block 0"),
        ("flap:33±1x8000±10", "a mean of 33 KV groups is not between 1 and the 32"),
        ("flap:20±30x8000±10", "20±30 KV groups: the nearest deviation"),
        ("flap:26x8577", "write depth:26"),
        ("wanda-sp:1.5", "--ratio 1.5 is outside (0, 1)"),
        ("wanda-sp:x", "write depth:26"),
        ("wonda-sp:0.2", "did you mean wanda-sp"),
    ],
)
def test_bad_plans_are_refused_by_name(text: str, problem: str) -> None:
    with pytest.raises(InputError) as caught:
        parse(text)
    assert problem in str(caught.value)
    assert "\n" not in str(caught.value)


def test_blind_plans_keep_the_first_units() -> None:
    assert parse("width:1x2@0-1").keep[:2] == (BlockKeep(0, "0", "0-1"), BlockKeep(1))
    assert parse("width:0x11008@0-1").keep[0] == BlockKeep(0, "", None)
