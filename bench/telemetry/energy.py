"""Power and energy of a window, each by the best source that is valid, and one checked against the other. Pure."""

from __future__ import annotations

from itertools import pairwise
from statistics import fmean
from typing import NamedTuple

from bench.telemetry.readings import Cut, Invalid, Pairs

# The energy counter moves in steps of some 0.1 s: spans this long keep that below a few per cent, and the mean over
# spans that begin and end at different phases of it keeps it lower.
SPAN_S, SPANS = 3.0, 10
COUNTER = "energy counter"


class Power(NamedTuple):
    """Watts: mean and highest, and which source of them answered."""

    mean_w: float
    most_w: float
    source: str


def power(cut: Cut) -> Power:
    """Return the power of a window from the driver's samples, else from readings: at an instant, else as the driver
    gives it (since Ampere a mean over a second). Raises Invalid where there is none."""
    try:
        return _power("ring", cut.ring("power_w"))
    except Invalid:
        pass
    try:
        return _power("instant", cut.series("power_instant_w"))
    except Invalid:
        return _power("usage", cut.series("power_w"))


def _power(source: str, pairs: Pairs) -> Power:
    area = sum((b + a) / 2 * (t - s) for (s, a), (t, b) in pairwise(pairs))
    span = pairs[-1][0] - pairs[0][0]
    return Power(area / span if span else pairs[0][1], max(value for _, value in pairs), source)


def watts(cut: Cut) -> float:
    """Return mean power by the counter of energy: over spans of at least 3 s whose ends are staggered.

    Raises Invalid where they are shorter, and where the counter stood still or went backwards.
    """
    pairs = cut.series("energy_j")
    if any(after < before for (_, before), (_, after) in pairwise(pairs)):
        raise Invalid("the energy counter went backwards: it was reset")
    spans = list(zip(pairs[:SPANS], pairs[-SPANS:], strict=True))
    if len(pairs) < 2 * SPANS or min(end[0] - start[0] for start, end in spans) < SPAN_S:
        seconds = pairs[-1][0] - pairs[0][0]
        raise Invalid(f"spans of the energy counter must be {SPAN_S:g} s long, the readings cover {seconds:.1f} s")
    rate = fmean((end[1] - start[1]) / (end[0] - start[0]) for start, end in spans)
    if rate <= 0:
        raise Invalid("the energy counter stood still")
    return rate


def above_idle(watts: float, idle_w: float | str) -> float:
    """Return power less that of the idle device. Raises Invalid where that is not known, or is more."""
    if isinstance(idle_w, str):
        raise Invalid(idle_w)
    if idle_w > watts:
        raise Invalid(f"the device took {watts:.0f} W, less than the {idle_w:.0f} W it took idle")
    return watts - idle_w
