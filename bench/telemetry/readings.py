"""What is read in one window, and how a quantity is taken from it where it is valid. Pure.

Times are seconds of the monotonic clock that all processes of the machine share. The sampler's window is a little wider
than the child's loop: what a share, a clock or a mean is made of is cut to the loop; what counts up is read at the
window's edges.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from statistics import median

import msgspec

PERIOD_S = 0.1
# A mean of readings needs this much of them: 2 s and 10 periods, whichever is more.
LEAST_S, LEAST_PERIODS = 2.0, 10
_GAP_PERIODS, _GAP_S = 3.0, 0.5
_NOT_READ = "was not read in the window"

Pairs = Sequence[tuple[float, float]]


class Reading(msgspec.Struct, frozen=True):
    """What was read at one time: values by quantity, and why the others could not be read. What is not asked every
    time is in neither."""

    at_s: float
    values: dict[str, float]
    missing: dict[str, str] = {}


class Loop(msgspec.Struct, frozen=True):
    """What a child did in a window: from when to when it called, how often, and the tokens it made."""

    since_s: float
    until_s: float
    calls: int
    tokens: int


class Window(msgspec.Struct, frozen=True):
    """Everything that was read for one window, two readings at least, by time.

    `cpu_s`: CPU time of the sampler in it; `no_device`: why no device was read, "" if one was; `rings`: the driver's
    own samples (time, value) by quantity, `gpm`: means between two readings, each or why there are none.
    """

    readings: tuple[Reading, ...]
    cpu_s: float = 0.0
    no_device: str = ""
    rings: dict[str, tuple[tuple[float, float], ...] | str] = {}
    gpm: dict[str, float | str] = {}

    @property
    def span_s(self) -> float:
        """Seconds from the first reading to the last."""
        return self.readings[-1].at_s - self.readings[0].at_s


class Invalid(Exception):
    """Raised where a quantity cannot be told; the text is the reason."""


class Cut:
    """A window cut to a child's loop; whole without one. Its questions raise Invalid with the reason."""

    def __init__(self, window: Window, loop: Loop | None) -> None:
        first, last = window.readings[0], window.readings[-1]
        self.window = window
        self.since_s, self.until_s = (loop.since_s, loop.until_s) if loop else (first.at_s, last.at_s)
        self.readings = tuple(one for one in window.readings if self.since_s <= one.at_s <= self.until_s)

    @property
    def seconds(self) -> float:
        """How long it is."""
        return self.until_s - self.since_s

    def series(self, name: str, after_s: float = 0.0) -> list[tuple[float, float]]:
        """Return (time, value) of a quantity, from `after_s` on; valid where the window is long enough for a mean and
        no reading failed."""
        if not any(name in one.values or name in one.missing for one in self.window.readings):
            self._unread()
        least = max(LEAST_S, LEAST_PERIODS * PERIOD_S)
        if self.seconds < least:
            raise Invalid(f"the window of {self.seconds:.2f} s is shorter than {least:g} s")
        for reading in self.readings:
            if name in reading.missing:
                raise Invalid(reading.missing[name])
        timed = [one for one in self.readings if one.at_s >= self.since_s + after_s and name in one.values]
        return [(one.at_s, one.values[name]) for one in timed] or self._unread()

    def values(self, name: str, after_s: float = 0.0) -> list[float]:
        """Return the values of `series`."""
        return [value for _, value in self.series(name, after_s)]

    def rise(self, name: str) -> float:
        """Return how much a counter rose between the window's own edges."""
        first, last = self.window.readings[0], self.window.readings[-1]
        for reading in (first, last):
            if name in reading.missing:
                raise Invalid(reading.missing[name])
            if name not in reading.values:
                self._unread()
        counted = [one.values[name] for one in self.window.readings if name in one.values]
        if any(after < before for before, after in pairwise(counted)):
            raise Invalid("the counter went backwards: it was reset")
        return counted[-1] - counted[0]

    def ring(self, name: str) -> list[tuple[float, float]]:
        """Return the driver's samples of a quantity inside the window, by time; valid where they cover it.

        The buffer is a ring: what is not fetched in time is overwritten, and what is fetched may begin anywhere.
        """
        found = self.window.rings.get(name) or self._unread()
        if isinstance(found, str):
            raise Invalid(found)
        kept = sorted({one for one in found if self.since_s <= one[0] <= self.until_s})
        if self.seconds < LEAST_S or len(kept) < LEAST_PERIODS:
            raise Invalid(f"the driver has {len(kept)} samples of a window of {self.seconds:.1f} s; 10 in 2 s are few")
        times = [self.since_s, *(at for at, _ in kept), self.until_s]
        gaps = [after - before for before, after in pairwise(times)]
        if max(gaps) > max(_GAP_PERIODS * median(gaps), _GAP_S):
            raise Invalid(f"the driver's samples lack {max(gaps):.1f} s of the window: the ring was overwritten")
        return kept

    def gpm(self, name: str) -> float:
        """Return a performance counter's mean."""
        found = self.window.gpm.get(name)
        if isinstance(found, float):
            return found
        raise Invalid(found or self.window.no_device or _NOT_READ)

    def _unread(self) -> list[tuple[float, float]]:
        raise Invalid(self.window.no_device or _NOT_READ)
