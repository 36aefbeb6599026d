"""The little statistics that comparing needs, in closed form: Student's t and the Benjamini-Hochberg procedure. Pure.

Own code, because importing scipy (0.2-0.5 s) alone would use up the time in which `compare` must answer; for whole
degrees of freedom the t distribution is a finite sum, exact, and the tests hold it against scipy.special.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import msgspec


def student_within(t: float, freedom: int) -> float:
    """Return P(|T| < t) for Student's t with `freedom` >= 1 degrees (Abramowitz and Stegun 26.7.3 and 26.7.4)."""
    angle = math.atan(t / math.sqrt(freedom))
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = freedom % 2 == 1
    term = cosine if odd else 1.0
    total = 0.0
    for k in range(2 + odd, freedom + 1, 2):  # one term for every second degree: 3, 5, ... or 2, 4, ...
        total += term
        term *= cosine * cosine * (k - 1) / k
    return 2 / math.pi * (angle + sine * total) if odd else sine * total


@lru_cache(maxsize=256)
def student_quantile(share: float, freedom: int) -> float:
    """Return the t with P(|T| < t) = `share`, by bisection to the last digit."""
    low, high = 0.0, 1.0
    while student_within(high, freedom) < share:
        high *= 2
    while True:
        middle = (low + high) / 2
        if middle in (low, high):
            return middle
        low, high = (middle, high) if student_within(middle, freedom) < share else (low, middle)


class Mean(msgspec.Struct, frozen=True):
    """The mean of paired differences: its 95 % t-interval, standard error, and two-sided p of "no difference"."""

    value: float
    low: float
    high: float
    error: float
    p: float
    count: int


def mean_of(differences: Sequence[float]) -> Mean:
    """Return the mean of at least two differences."""
    count = len(differences)
    value = math.fsum(differences) / count
    variance = math.fsum((one - value) ** 2 for one in differences) / (count - 1)
    error = math.sqrt(variance / count)
    reach = student_quantile(0.95, count - 1) * error
    if error == 0:
        return Mean(value, value, value, 0.0, 1.0 if value == 0 else 0.0, count)
    return Mean(value, value - reach, value + reach, error, 1 - student_within(abs(value) / error, count - 1), count)


def detectable(error: float, count: int, floor: float, tests: int = 1) -> float:
    """Return the least true difference that `count` pairs of this standard error find in 80 of 100 experiments.

    The interval must clear zero with 80 % power, and the effect must exceed `floor`. `tests` is the number of cells
    tested together: a lone true effect must then pass at 0.05 / tests, the first step of Benjamini and Hochberg.
    """
    # Within 0.6 to both sides is below 0.8.
    reach = student_quantile(1 - 0.05 / tests, count - 1) + student_quantile(0.6, count - 1)
    return max(floor, reach * error)


def adjusted(ps: Sequence[float]) -> list[float]:
    """Return the Benjamini-Hochberg adjusted p of each: the least false-discovery rate at which it is still found."""
    count = len(ps)
    order = sorted(range(count), key=lambda i: ps[i], reverse=True)
    result = [1.0] * count
    least = 1.0
    for rank, index in enumerate(order):
        least = min(least, ps[index] * count / (count - rank))
        result[index] = least
    return result
