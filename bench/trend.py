"""Where a cell's history changed its level: change points in one value a run, runs in order. Pure.

Binary segmentation on logs. A series is split where the means of both sides differ most for their noise; where that
could be noise, nothing is split. The noise is what the gate knows: the machine's own between sessions, or what the
histories themselves show, whichever is larger (`noise_of`), so that a wrong figure does not make a machine cry wolf.
All splits of all series tested together share 5 %: unchanged code gets a mark in at most 5 of 100 reports. A change
below the gate's floor is none. Each side needs two runs: one odd run is no new level, and whether the last run is one
is for `compare` and `ab` to tell.

The pairwise differences that the noise is estimated from hold at most a few steps, and their median does not see them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import pairwise
from statistics import NormalDist, median

import msgspec

from bench.verdicts import FLOOR, NOISE

SHARE = 0.05  # of reports on unchanged code that mark anything
LEAST_RUNS = 4
LEAST_SIDE = 2
# `noise_between_sessions` is 1.96 sqrt(2) standard deviations (see bench.noise).
_REACH = NormalDist().inv_cdf(0.975) * math.sqrt(2)
# The median of |difference of two normal values| in standard deviations.
_MEDIAN_DIFFERENCE = NormalDist().inv_cdf(0.75) * math.sqrt(2)


class Change(msgspec.Struct, frozen=True):
    """A new level from the run of index `at` on; `ratio` of the level after to the level before."""

    at: int
    ratio: float


def noise_of(series: Iterable[Sequence[float]], allowance: float | None = None) -> float:
    """Return the standard deviation of log values between runs.

    `allowance`: what two sessions of equal code may differ by here (a share), None where none is stored.
    """
    known = math.log1p(NOISE if allowance is None else allowance) / _REACH
    steps = [abs(math.log(after / before)) for one in series for before, after in pairwise(one)]
    seen = median(steps) / _MEDIAN_DIFFERENCE if len(steps) >= LEAST_RUNS else 0.0
    return max(known, seen)


def changes(values: Sequence[float], noise: float, tests: int = 1, floor: float = FLOOR) -> tuple[Change, ...]:
    """Return the changes of level in positive values, one a run, oldest first.

    `noise`: as `noise_of` returns it; `tests`: series that are looked at together; `floor`: the least change that
    matters, as a log ratio.
    """
    if len(values) < LEAST_RUNS:
        return ()
    logs = [math.log(value) for value in values]
    limit = NormalDist().inv_cdf(1 - SHARE / (2 * tests * (len(values) - 1)))
    edges = [0, *sorted(_splits(logs, 0, len(logs), noise, limit, floor)), len(logs)]
    levels = [math.fsum(logs[a:b]) / (b - a) for a, b in pairwise(edges)]
    return tuple(Change(at, math.exp(b - a)) for at, (a, b) in zip(edges[1:-1], pairwise(levels), strict=True))


def _splits(logs: Sequence[float], start: int, end: int, noise: float, limit: float, floor: float) -> list[int]:
    """The places where logs[start:end] and its parts are split."""
    best, where, step = 0.0, 0, 0.0
    total, left = math.fsum(logs[start:end]), math.fsum(logs[start : start + LEAST_SIDE - 1])
    for at in range(start + LEAST_SIDE, end - LEAST_SIDE + 1):
        left += logs[at - 1]
        before, after = at - start, end - at
        difference = (total - left) / after - left / before
        size = abs(difference) / math.sqrt(1 / before + 1 / after)
        if size > best:
            best, where, step = size, at, difference
    if best <= limit * noise or abs(step) <= floor:
        return []
    return [
        *_splits(logs, start, where, noise, limit, floor), where, *_splits(logs, where, end, noise, limit, floor),
    ]  # fmt: skip
