"""Looking at growing data costs what it says: boundaries against simulation and against published tables."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.sequential import FULL, Looks, crossing, looks_of


@pytest.mark.parametrize(
    ("most", "constant"),
    # O'Brien-Fleming constants for 2 to 5 equally spaced looks at 5 %, two-sided: Jennison and Turnbull, Group
    # Sequential Methods (2000), table 2.3.
    [(1, 1.960), (2, 1.977), (3, 2.004), (4, 2.024), (5, 2.040)],
)
def test_the_boundaries_are_the_published_ones(most: int, constant: float) -> None:
    assert crossing(constant, 1, most) == pytest.approx(0.05, abs=1e-4)


def test_equal_code_crosses_as_often_as_simulated_paths_do() -> None:
    source = np.random.default_rng(0)
    paths = np.cumsum(source.normal(size=(200_000, 12)), axis=1)[:, 4:] / np.sqrt(12)
    for boundary in (1.0, 2.0, 2.5):
        expected = float((np.abs(paths) >= boundary).any(axis=1).mean())
        assert crossing(boundary, 5, 12) == pytest.approx(expected, abs=0.003)


@given(st.integers(1, 12), st.integers(1, 12), st.floats(1e-9, 0.5))
def test_levels_and_p_are_inverse(first: int, more: int, share: float) -> None:
    looks = Looks(first, first + more - 1)
    for count in range(first, looks.most + 1):
        assert looks.p(looks.level(count, share), count) == pytest.approx(share, rel=1e-6)


@given(st.integers(5, 12), st.floats(0, 1))
def test_looking_more_often_never_makes_a_p_smaller(count: int, p: float) -> None:
    assert FULL.p(p, count) >= p * (1 - 1e-3)


def test_one_look_changes_nothing() -> None:
    for p in (0.0, 1e-12, 0.01, 0.5, 1.0):
        assert Looks(7, 7).p(p, 7) == pytest.approx(p, rel=1e-3)
    assert Looks(7, 7).level(7) == pytest.approx(0.05, rel=1e-3)


def test_early_looks_spend_little_and_the_last_nearly_all() -> None:
    levels = [FULL.level(count) for count in range(4, 13)]
    assert levels[0] == 0
    assert levels == sorted(levels)
    assert levels[1] < 0.0015
    assert 0.035 < levels[-1] < 0.05


@pytest.mark.parametrize(("count", "expected"), [(2, (2, 2)), (5, (5, 5)), (6, (5, 12)), (12, (5, 12)), (20, (5, 20))])
def test_more_than_five_pairs_count_as_an_extension(count: int, expected: tuple[int, int]) -> None:
    assert looks_of(count) == Looks(*expected)
