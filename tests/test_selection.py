from __future__ import annotations

from fractions import Fraction
from math import floor

import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import scores_of

from shortllama import selection

ratios = st.integers(1, 999).map(lambda thousandths: thousandths / 1000)
protections = st.tuples(st.integers(0, 5), st.integers(0, 5))


@given(st.integers(0, 200), st.integers(1, 999))
def test_half_up_is_exact_on_the_decimal_as_written(count: int, thousandths: int) -> None:
    exact = floor(Fraction(thousandths, 1000) * count + Fraction(1, 2))
    assert selection.half_up(count, thousandths / 1000) == exact


def test_half_up_where_binary_floats_go_wrong() -> None:
    assert floor(0.29 * 50 + 0.5) == 14  # the product is 14.499...
    assert selection.half_up(50, 0.29) == 15
    assert [selection.half_up(count, 0.25) for count in (1, 2, 5, 6, 12, 32)] == [0, 1, 1, 2, 3, 8]


@pytest.mark.parametrize(
    ("count", "ratio", "removed"),
    [(32, 0.2, 6), (32, 0.29, 9), (32, 0.35, 11), (40, 0.2, 8), (40, 0.28, 11), (40, 0.37, 14), (11008, 0.35, 3852)],
)
def test_truncated_counts_of_the_published_code(count: int, ratio: float, removed: int) -> None:
    assert selection.truncated(count, ratio) == removed


@given(st.integers(0, 12), protections)
def test_candidates_are_all_but_both_ends(blocks: int, protect: tuple[int, int]) -> None:
    expected = [i for i in range(blocks) if i >= protect[0] and blocks - 1 - i >= protect[1]]
    assert list(selection.candidates(blocks, protect)) == expected


@given(st.integers(0, 12).flatmap(scores_of), protections)
def test_the_removal_order_is_ascending_stable_and_never_protected(
    scores: tuple[float, ...], protect: tuple[int, int]
) -> None:
    order = selection.removal_order(scores, protect)
    assert sorted(order) == list(selection.candidates(len(scores), protect))
    keys = [(scores[i], i) for i in order]
    assert keys == sorted(keys)


@given(st.data(), st.integers(0, 12))
def test_the_highest_are_kept_and_ties_fall_to_the_lower_index(data: st.DataObject, size: int) -> None:
    scores = data.draw(scores_of(size))
    keep = data.draw(st.integers(0, size))
    kept = selection.highest(scores, keep)
    gone = [i for i in range(size) if i not in kept]
    assert len(kept) == keep
    assert list(kept) == sorted(kept)
    assert all((scores[g], g) < (scores[k], k) for g in gone for k in kept)


@given(st.lists(st.integers(1, 50), max_size=12), st.integers(0, 700))
def test_the_count_for_a_size_equals_brute_force(sizes: list[int], excess: int) -> None:
    counts = range(len(sizes) + 1)
    within = [n for n in counts if sum(sizes[:n]) <= excess]
    enough = [n for n in counts if sum(sizes[:n]) >= excess]
    assert selection.count_for(sizes, excess, at_most=False) == max(within)
    assert selection.count_for(sizes, excess, at_most=True) == min(enough, default=len(sizes))


@given(st.integers(0, 300), st.integers(0, 300), st.integers(1, 128))
def test_aligning_rounds_up_within_the_size(keep: int, extra: int, multiple: int) -> None:
    size = keep + extra
    aligned = selection.align_up(keep, size, multiple)
    assert keep <= aligned <= size
    assert aligned - keep < multiple
    assert aligned % multiple == 0 or aligned == size


@given(st.floats(0.001, 0.999))
def test_bisection_finds_the_edge(edge: float) -> None:
    last, first = selection.last_true(lambda ratio: ratio <= edge)
    assert last <= edge < first
    assert first - last <= 2**-52
