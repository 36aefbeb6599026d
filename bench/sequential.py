"""Looking at an experiment while it grows: what a p means when the same data are judged after every new pair. Pure.

Five pairs of sessions are judged, and as long as that decides nothing, a sixth is added, up to twelve. Judged by the
plain 95 % interval each time, equal code would be flagged two to three times as often as promised. So the looks share
the 5 % between them as O'Brien and Fleming do (Biometrics 35, 1979): at `count` of `most` pairs, z counts as
z * sqrt(count / most), and a result is significant where that exceeds one constant. Early looks spend nearly nothing,
the last one nearly all, so the last costs little power.

The t of a look becomes z through its p, the usual way with few pairs; `make gate-study` shows what it does to the
false alarms.
"""

from __future__ import annotations

import math
from functools import lru_cache
from statistics import NormalDist

import msgspec

SHARE = 0.05  # of experiments on equal code that may be flagged, both directions together
_NORMAL = NormalDist()
_GRID = 0.125  # between boundaries at which the crossing probability is computed; between them z is interpolated
_SMALLEST = 1e-300
_LARGEST = 8.0  # a boundary that equal code crosses with a probability of 1e-15
_NODES = 48  # of Simpson's rule on half the range; even


class Looks(msgspec.Struct, frozen=True):
    """An experiment judged at `first` pairs of sessions and after every further one, to at most `most`."""

    first: int
    most: int

    def p(self, p: float, count: int) -> float:
        """Return the chance that equal code shows as much as `p` does at `count` pairs, at any of the looks.

        `p`: two-sided, of one look by itself. The result is a valid p for any rule of stopping among the looks; below
        1e-15 it is not told apart.
        """
        z = -_NORMAL.inv_cdf(max(p, _SMALLEST) / 2)
        return _beyond(self._overall(z * math.sqrt(count / self.most)))

    def level(self, count: int, share: float = SHARE) -> float:
        """Return the p of one look at `count` pairs at which the looks together have flagged `share` of equal code.

        0 where `count` pairs are too few to be looked at.
        """
        if count < self.first:
            return 0.0
        return _beyond(_boundary(share, self.first, self.most) * math.sqrt(self.most / count))

    def _overall(self, boundary: float) -> float:
        """The z of a single look that is as rare among equal code as crossing `boundary` at any look."""
        place = min(boundary, _LARGEST) / _GRID
        below = min(int(place), round(_LARGEST / _GRID) - 1)
        low, high = (_node(index, self.first, self.most) for index in (below, below + 1))
        return low + (place - below) * (high - low)


FULL = Looks(5, 12)


def looks_of(count: int) -> Looks:
    """Return how `count` pairs were looked at where nothing says so: at once up to 5 pairs, else as an extension.

    Taking more than 5 for an extension errs on the quiet side.
    """
    return Looks(count, count) if count <= FULL.first else Looks(FULL.first, max(FULL.most, count))


def _beyond(z: float) -> float:
    """P(|Z| >= z): NormalDist.cdf loses the digits of small tails (before Python 3.13)."""
    return math.erfc(z / math.sqrt(2))


@lru_cache(maxsize=4096)
def _boundary(share: float, first: int, most: int) -> float:
    """The inverse of `Looks._overall` at the z of `share`."""
    wanted = -_NORMAL.inv_cdf(share / 2)
    for index in range(round(_LARGEST / _GRID)):
        low, high = (_node(one, first, most) for one in (index, index + 1))
        if wanted <= high:
            return (index + (wanted - low) / (high - low)) * _GRID
    return _LARGEST


@lru_cache(maxsize=4096)
def _node(index: int, first: int, most: int) -> float:
    return -_NORMAL.inv_cdf(crossing(index * _GRID, first, most) / 2)


def crossing(boundary: float, first: int, most: int) -> float:
    """Return P(|B(t)| >= `boundary` at any t = first/most, ..., 1) for a Brownian motion B.

    By Armitage, McPherson and Rowe's recursion (J. R. Stat. Soc. A 132, 1969) over the density of paths that have not
    crossed yet, on the positive half (it is even), with Simpson's rule. What leaves at each look is summed, not
    subtracted from 1, so small probabilities keep their digits.
    """
    if boundary <= 0:
        return 1.0
    start = math.sqrt(first / most)
    total = _beyond(boundary / start)
    if first == most:
        return total
    step = boundary / _NODES
    places = [i * step for i in range(_NODES + 1)]
    weights = [step / 3 * (1 if i in (0, _NODES) else 4 if i % 2 else 2) for i in range(_NODES + 1)]
    unit = math.sqrt(1 / most)
    spread = NormalDist(0, unit)
    density = [NormalDist(0, start).pdf(x) for x in places]
    # Both depend on distances of whole steps alone.
    jump = [spread.pdf(i * step) for i in range(2 * _NODES + 1)]
    leave = [_beyond(i * step / unit) / 2 for i in range(2 * _NODES + 1)]
    for look in range(first, most):
        mass = [weight * value for weight, value in zip(weights, density, strict=True)]
        total += 2 * math.fsum(one * (leave[_NODES - i] + leave[_NODES + i]) for i, one in enumerate(mass))
        if look + 1 < most:
            density = [
                math.fsum(one * (jump[abs(i - j)] + jump[i + j]) for j, one in enumerate(mass))
                for i in range(_NODES + 1)
            ]
    return min(1.0, total)
