"""Change points: none in noise at the stated rate, planted steps where they were planted."""

from __future__ import annotations

import math
import random
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench import trend
from bench.verdicts import FLOOR, NOISE

SIGMA = math.log1p(NOISE) / (1.96 * math.sqrt(2))


def history(seed: int, runs: int, sigma: float, step: float = 1.0, at: int = 0) -> list[float]:
    drawn = random.Random(seed)
    return [drawn.lognormvariate(0, sigma) * (step if place >= at else 1.0) for place in range(runs)]


@pytest.mark.parametrize(
    ("runs", "cells", "louder"),
    [(4, 1, 1.0), (8, 1, 1.0), (20, 1, 1.0), (4, 12, 1.0), (8, 12, 1.0), (20, 12, 1.0), (4, 12, 2.0), (20, 12, 2.0)],
)
def test_unchanged_code_is_marked_in_at_most_5_of_100_reports(runs: int, cells: int, louder: float):
    """Also on a machine twice as noisy as is known of it, where there are histories enough to see that."""
    reports, alarms = 600, 0
    for report in range(reports):
        series = [history(report * cells + cell, runs, SIGMA * louder) for cell in range(cells)]
        noise = trend.noise_of(series)
        alarms += any(trend.changes(one, noise, cells) for one in series)
    # 5 % and three standard errors of a share estimated from 600 reports.
    assert alarms / reports <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / reports)


@given(
    runs=st.integers(8, 30), data=st.data(), step=st.sampled_from([0.8, 0.9, 1.1, 1.25]), seed=st.integers(0, 10_000)
)
def test_a_planted_step_is_found_where_it_is(runs, data, step, seed):
    at = data.draw(st.integers(3, runs - 3))
    values = history(seed, runs, SIGMA / 4, step, at)
    (found,) = trend.changes(values, SIGMA, 10)
    assert found.at == at
    assert found.ratio == pytest.approx(step, rel=0.02)


def test_up_and_down_again_are_two_changes():
    values = [1.0] * 5 + [1.2] * 4 + [1.0] * 6
    assert [(one.at, round(one.ratio, 3)) for one in trend.changes(values, SIGMA)] == [(5, 1.2), (9, 0.833)]


@given(st.integers(4, 20), st.integers(0, 19), st.floats(0.5, 2))
def test_one_odd_run_is_no_new_level(runs, place, odd):
    """Nothing begins or ends at it alone: each level holds two runs or more."""
    values = [1.0] * runs
    values[place % runs] = odd
    edges = [0, *(one.at for one in trend.changes(values, SIGMA)), runs]
    assert all(b - a >= trend.LEAST_SIDE for a, b in pairwise(edges))


def test_too_few_runs_and_too_small_steps_say_nothing():
    assert trend.changes([1.0, 1.0, 9.0], SIGMA) == ()
    assert trend.changes([1.0] * 50 + [math.exp(FLOOR * 0.99)] * 50, SIGMA / 100) == ()
    assert trend.changes([1.0] * 50 + [math.exp(FLOOR * 1.01)] * 50, SIGMA / 100) != ()


@given(st.lists(st.floats(1e-6, 1e3), min_size=4, max_size=30), st.floats(1e-3, 1e3))
def test_units_do_not_matter(values, factor):
    scaled = trend.changes([value * factor for value in values], SIGMA)
    assert [one.at for one in trend.changes(values, SIGMA)] == [one.at for one in scaled]


def test_noise_is_the_larger_of_what_is_known_and_what_is_seen():
    assert trend.noise_of([]) == pytest.approx(SIGMA, rel=1e-3)
    assert trend.noise_of([[1.0] * 9], 0.1) == pytest.approx(math.log1p(0.1) / 2.772, rel=1e-3)
    loud = [history(seed, 30, 0.1) for seed in range(20)]
    assert trend.noise_of(loud) == pytest.approx(0.1, rel=0.1)
    stepped = [history(seed, 30, 0.1, 3.0, 15) for seed in range(20)]
    assert trend.noise_of(stepped) == pytest.approx(0.1, rel=0.15)
