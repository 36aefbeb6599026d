"""The little statistics that comparing needs, in closed form: Student's t and the Benjamini-Hochberg procedure. Pure.

Own code, because importing scipy (0.2-0.5 s) alone would use up the time in which `compare` must answer; for whole
degrees of freedom the t distribution is a finite sum, exact, and the tests hold it against scipy.special.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import msgspec


def student_beyond(t: float, freedom: int) -> float:
    """Return P(|T| > t) for Student's t >= 0 with `freedom` >= 1 degrees, to full relative precision.

    Near the middle 1 minus the finite sums of Abramowitz and Stegun 26.7.3 and 26.7.4; in the tails, where that would
    cancel, the power series of the incomplete beta function (26.5.4 with 26.7.1).
    """
    if t * t <= freedom:
        return 1 - _student_within(t, freedom)
    a, x = freedom / 2, freedom / (freedom + t * t)
    log_beta = math.lgamma(a) + math.lgamma(0.5) - math.lgamma(a + 0.5)
    total, term, n = 0.0, 1.0, 0
    while term > 1e-17 * total:
        total += term
        term *= x * (a + 0.5 + n) / (a + 1 + n)
        n += 1
    return math.exp(a * math.log(x) + 0.5 * math.log1p(-x) - log_beta) / a * total


def _student_within(t: float, freedom: int) -> float:
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
def student_quantile(level: float, freedom: int) -> float:
    """Return the t with P(|T| > t) = `level`, 0 < level < 1, by bisection to the last digit."""
    low, high = 0.0, 1.0
    while student_beyond(high, freedom) > level:
        high *= 2
    while True:
        middle = (low + high) / 2
        if middle in (low, high):
            return middle
        low, high = (middle, high) if student_beyond(middle, freedom) > level else (low, middle)


class Mean(msgspec.Struct, frozen=True):
    """The mean of paired differences: its t-interval, standard error, and two-sided p of "no difference"."""

    value: float
    low: float
    high: float
    error: float
    p: float
    count: int


def mean_of(differences: Sequence[float], level: float = 0.05) -> Mean:
    """Return the mean of at least two differences; the interval misses the true one with probability `level`."""
    count = len(differences)
    value = math.fsum(differences) / count
    variance = math.fsum((one - value) ** 2 for one in differences) / (count - 1)
    error = math.sqrt(variance / count)
    reach = student_quantile(level, count - 1) * error
    if error == 0:
        return Mean(value, value, value, 0.0, 1.0 if value == 0 else 0.0, count)
    return Mean(value, value - reach, value + reach, error, student_beyond(abs(value) / error, count - 1), count)


def detectable(error: float, count: int, floor: float, level: float = 0.05) -> float:
    """Return the least true difference that `count` pairs of this standard error find in 80 of 100 experiments.

    The estimate must exceed `floor`, and what is significant at `level`, with 80 % power.
    """
    # Beyond 0.4 to both sides is above 0.8 to one.
    needed = max(floor, student_quantile(level, count - 1) * error)
    return needed + student_quantile(0.4, count - 1) * error


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
