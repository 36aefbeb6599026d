"""The largest batch that fits, found by trials: which batch to try next, and when the answer stands. Pure.

`advise` looks at the trials so far and returns the next one to make, or the answer; it keeps no state of its own, so a
search can be replayed and tested against brute force. In order:

1. bracket: try below and above what the memory model predicts, by the 5 % that it may be wrong; where it is more wrong,
   gallop on, each step twice the last;
2. bisect on integers until one batch fits and the next does not;
3. confirm both in fresh processes: the batch that fits by one whole generation, the next one by failing again;
4. look beyond: two and eight further must not fit; where one does, memory is not monotone, and the answer says so.

With a prediction within 5 % of the answer M that is at most 7 + ceil(log2(1 + 0.1 M)) trials. A batch with answers of
both kinds is tried again, and the majority of three holds. Where a whole generation fails and the probe of
the same batch passed (a growing cache may fragment), only whole generations count as fitting from then on.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import count

import msgspec

TOLERANCE = 0.05
BEYOND = (2, 8)
LARGEST = 1 << 20


class Trial(msgspec.Struct, frozen=True):
    """A batch that was tried: by a `whole` generation or by one prefill and the last step; and whether it fits."""

    batch: int
    fits: bool
    whole: bool = False


class Ask(msgspec.Struct, frozen=True):
    """The next trial to make."""

    batch: int
    whole: bool = False


class Answer(msgspec.Struct, frozen=True):
    """The search is over. `largest`: 0 where not even one sequence fits; `open_ended`: memory never ended.

    `beyond`: batches above the largest that fit although smaller ones do not; `unsteady`: batches that fit in one trial
    and not in another.
    """

    largest: int
    open_ended: bool = False
    beyond: tuple[int, ...] = ()
    unsteady: tuple[int, ...] = ()


def most_trials(largest: int) -> int:
    """Return how many trials a search may take whose prediction was within 5 % of `largest`."""
    return 7 + math.ceil(math.log2(1 + largest / 10))


def advise(trials: Sequence[Trial], predicted: int) -> Ask | Answer:
    """Return the next trial, or the answer, after `trials` of a search that began with the prediction `predicted`."""
    heard = _Heard(trials)
    again = heard.undecided()
    if again is not None:
        return Ask(again, heard.whole_only)
    low, high = heard.ends()
    if high is None and low < LARGEST:
        return Ask(_upward(predicted, low), heard.whole_only)
    if high is None:
        return Answer(low, open_ended=True, unsteady=heard.unsteady())
    if high - low > 1:
        middle = _downward(predicted, high) if low == 0 else (low + high) // 2
        return Ask(middle, heard.whole_only)
    return _confirm(heard, low, high)


def _confirm(heard: _Heard, low: int, high: int) -> Ask | Answer:
    if low and not heard.passed(low, whole=True):
        return Ask(low, whole=True)
    if heard.failures(high) < 2:
        return Ask(high, heard.whole_only)
    if low and heard.passes(low) < 2:
        return Ask(low, heard.whole_only)
    further = [low + more for more in BEYOND] if low else []
    for batch in further:
        if heard.fits(batch) is None:
            return Ask(batch, heard.whole_only)
    beyond = tuple(batch for batch in heard.tried() if batch > high and heard.fits(batch))
    return Answer(low, beyond=beyond, unsteady=heard.unsteady())


# -- where to look -----------------------------------------------------------------------------------------------------


def _window(predicted: int) -> tuple[int, int]:
    """The smallest answer for which the prediction is within the tolerance, and one more than the largest."""
    return max(1, int(predicted / (1 + TOLERANCE))), int(predicted / (1 - TOLERANCE)) + 1


def _upward(predicted: int, low: int) -> int:
    """The first point above `low` of: the window's ends, then steps of 1, 3, 7, ... windows above it."""
    first, last = _window(predicted)
    if low < first:
        return first
    width = max(last - first, 1)
    return min(next(last + width * ((1 << k) - 1) for k in count() if last + width * ((1 << k) - 1) > low), LARGEST)


def _downward(predicted: int, high: int) -> int:
    """The first point below `high` of: the window's beginning, then steps of 1, 3, 7, ... windows below; at least 1."""
    first, last = _window(predicted)
    width = max(last - first, 1)
    return max(next(first - width * ((1 << k) - 1) for k in count() if first - width * ((1 << k) - 1) < high), 1)


# -- what was heard ----------------------------------------------------------------------------------------------------


class _Heard:
    """Trials by batch, and what they mean together."""

    def __init__(self, trials: Iterable[Trial]) -> None:
        self._by_batch: dict[int, list[Trial]] = {}
        for trial in trials:
            self._by_batch.setdefault(trial.batch, []).append(trial)
        self.whole_only = any(
            any(t.whole and not t.fits for t in heard) and any(t.fits and not t.whole for t in heard)
            for heard in self._by_batch.values()
        )

    def tried(self) -> list[int]:
        return sorted(self._by_batch)

    def _counted(self, batch: int) -> list[Trial]:
        """The trials of a batch that count: a probe that passed says nothing where only whole generations do."""
        heard = self._by_batch.get(batch, [])
        return [t for t in heard if t.whole or not t.fits or not self.whole_only]

    def passes(self, batch: int) -> int:
        return sum(t.fits for t in self._counted(batch))

    def failures(self, batch: int) -> int:
        return sum(not t.fits for t in self._counted(batch))

    def passed(self, batch: int, *, whole: bool) -> bool:
        return any(t.fits and t.whole == whole for t in self._by_batch.get(batch, []))

    def fits(self, batch: int) -> bool | None:
        """Whether a batch fits by what was heard; None where nothing was, or as much for as against."""
        passes, failures = self.passes(batch), self.failures(batch)
        return None if passes == failures else passes > failures

    def undecided(self) -> int | None:
        """A batch with as many trials for as against it."""
        for batch in self._by_batch:
            if self._counted(batch) and self.fits(batch) is None:
                return batch
        return None

    def unsteady(self) -> tuple[int, ...]:
        return tuple(batch for batch in self.tried() if self.passes(batch) and self.failures(batch))

    def ends(self) -> tuple[int, int | None]:
        """The largest batch that fits below the smallest that does not, and that one; 0 and None where none is."""
        high = min((batch for batch in self._by_batch if self.fits(batch) is False), default=None)
        below = [batch for batch in self._by_batch if self.fits(batch) and (high is None or batch < high)]
        return max(below, default=0), high
