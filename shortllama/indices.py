"""Sets of indices as text: `0-3,7,12-31`. Plans store kept KV groups and neurons this way. Pure strings and tuples."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain

from shortllama.errors import PlanError


def format_indices(indices: Iterable[int]) -> str:
    """Return the canonical text of a set of indices: ascending, runs joined by `-`; the empty set is ''."""
    ordered = sorted(set(indices))
    runs: list[str] = []
    start = 0
    for position, value in enumerate(ordered):
        last = position + 1 == len(ordered) or ordered[position + 1] != value + 1
        if last:
            first = ordered[start]
            runs.append(str(first) if first == value else f"{first}-{value}")
            start = position + 1
    return ",".join(runs)


def parse_indices(text: str, size: int) -> tuple[int, ...]:
    """Return the ascending indices that `text` names, each in [0, size).

    Raises PlanError for text that is not a strictly ascending list of numbers and `a-b` ranges within `size`.
    """
    return tuple(chain.from_iterable(_runs(text, size)))


def count_indices(text: str, size: int) -> int:
    """Return how many indices `text` names, without listing them. Raises PlanError as `parse_indices` does."""
    return sum(map(len, _runs(text, size)))


def _runs(text: str, size: int) -> list[range]:
    runs: list[range] = []
    for part in text.split(",") if text else ():
        first, dash, last = part.partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise PlanError(f"index set {text!r}: {part!r} is neither a number nor a range such as 4-7")
        low, high = int(first), int(last) if dash else int(first)
        if high < low or (runs and low < runs[-1].stop):
            raise PlanError(f"index set {text!r}: {part!r} does not ascend; list each index once, in order")
        if high >= size:
            raise PlanError(
                f"index set {text!r}: {high} is out of range; this dimension has {size} units (0-{size - 1})"
            )
        runs.append(range(low, high + 1))
    return runs
