"""Which units go and how many: pure choices over scores and counts.

Shared by every method, so that rounding and ties are decided in one place. Scores are "higher = keep"; among equal
scores the lower index goes first (a stable ascending sort), where published thresholds (`>=`) may keep more units than
asked for. It must not know of models, methods or files.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from decimal import ROUND_HALF_UP, Decimal


def half_up(count: int, ratio: float) -> int:
    """Return the integer nearest to ratio * count, halves up, of the decimal number the user wrote.

    In binary floats 0.29 * 50 is 14.499..., which would round down.
    """
    return int((Decimal(repr(float(ratio))) * count).to_integral_value(ROUND_HALF_UP))


def truncated(count: int, ratio: float) -> int:
    """Return int(ratio * count) in binary floats, as the published code of Wanda-sp and Mag-sp computes it."""
    return int(ratio * count)


def candidates(blocks: int, protect: tuple[int, int]) -> range:
    """Return the blocks that may go: all but the first `protect[0]` and the last `protect[1]`."""
    first, last = protect
    return range(first, max(first, blocks - last))


def removal_order(scores: Sequence[float], protect: tuple[int, int]) -> tuple[int, ...]:
    """Return the unprotected indices, the first to go (lowest score) first."""
    return tuple(sorted(candidates(len(scores), protect), key=scores.__getitem__))


def highest(scores: Sequence[float], keep: int) -> tuple[int, ...]:
    """Return the indices of the `keep` highest scores, ascending."""
    order = sorted(range(len(scores)), key=scores.__getitem__)
    return tuple(sorted(order[len(order) - keep :]))


def heads_within(groups: Iterable[int], size: int, keep: int, scores: Sequence[float] | None = None) -> tuple[int, ...]:
    """Return the query heads that stay in `groups` of `size` heads each, ascending: the `keep` best of each group.

    Head j is of group j // size. The first ones stay where there are no scores.
    """
    stay: list[int] = []
    for start in (group * size for group in groups):
        best = range(keep) if scores is None else highest(scores[start : start + size], keep)
        stay += [start + offset for offset in best]
    return tuple(stay)


def count_for(sizes: Sequence[int], excess: int, *, at_most: bool) -> int:
    """Return how many of `sizes`, taken in order, must go so that `excess` of them is removed.

    By default the largest number whose sum does not pass `excess` (for equal sizes floor(excess / size), the rule
    that gives the paper's 6/9/11 and 8/11/15 blocks); with `at_most` the smallest whose sum reaches it, or all.
    """
    removed = 0
    for count, size in enumerate(sizes):
        if removed >= excess if at_most else removed + size > excess:
            return count
        removed += size
    return len(sizes)


def nearest_count(sizes: Sequence[int], excess: int) -> int:
    """Return how many of `sizes`, taken in order, have the sum nearest to `excess`; the higher of two as near."""
    sums = [0]
    for size in sizes:
        sums.append(sums[-1] + size)
    return min(range(len(sums)), key=lambda count: (abs(sums[count] - excess), -count))


def best_run(scores: Sequence[float], starts: Sequence[int]) -> int:
    """Return the start with the lowest of `scores`, which are those of runs by start; the first among equals."""
    return min(starts, key=scores.__getitem__)


def align_up(keep: int, size: int, multiple: int) -> int:
    """Return `keep` rounded up to a multiple, and `size` where that passes it: aligning never removes more."""
    return min(size, -(-keep // multiple) * multiple)


def last_true(holds: Callable[[float], bool]) -> tuple[float, float]:
    """Return neighbouring ratios in (0, 1): the last at which `holds`, and the first at which it does not.

    `holds` must be true at 0, and false from some ratio on. Bisection down to 2**-52.
    """
    low, high = 0.0, 1.0
    while high - low > 2**-52:
        middle = (low + high) / 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low, high
