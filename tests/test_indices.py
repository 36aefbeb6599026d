from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shortllama.errors import PlanError
from shortllama.indices import count_indices, format_indices, parse_indices


@given(st.sets(st.integers(0, 60)))
def test_text_and_indices_are_one_to_one(indices: set[int]) -> None:
    text = format_indices(indices)
    assert parse_indices(text, 61) == tuple(sorted(indices))
    assert count_indices(text, 61) == len(indices)


@given(st.sets(st.integers(0, 60), min_size=1))
def test_the_text_is_canonical(indices: set[int]) -> None:
    # No two runs touch, so there is one text for a set, and equal sets have equal digests.
    ends = [tuple(map(int, part.split("-"))) for part in format_indices(indices).split(",")]
    assert all(later[0] > earlier[-1] + 1 for earlier, later in pairwise(ends))


def test_known_texts() -> None:
    assert format_indices([7, 3, 2, 1, 0, 12, 13]) == "0-3,7,12-13"
    assert format_indices([]) == ""
    assert parse_indices("", 0) == ()


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("a", "'a' is neither a number nor a range"),
        ("1,", "'' is neither a number nor a range"),
        ("-3", "'-3' is neither"),
        ("3-", "'3-' is neither"),
        ("1-2-3", "'1-2-3' is neither"),
        ("5-4", "'5-4' does not ascend"),
        ("0-3,3", "'3' does not ascend"),
        ("4,2", "'2' does not ascend"),
        ("2-10", "10 is out of range; this dimension has 10 units (0-9)"),
        ("²", "'²' is neither"),
    ],
)
@pytest.mark.parametrize("read", [parse_indices, count_indices])
def test_bad_text_is_refused_with_the_part_that_is_wrong(read, text: str, problem: str) -> None:
    with pytest.raises(PlanError) as caught:
        read(text, 10)
    assert problem in str(caught.value)
    assert repr(text) in str(caught.value)
