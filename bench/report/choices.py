"""Which cells a sentence should be about: one setting a runtime, one batch, one winner. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from bench.report.summaries import Grid, Group, Setting, Summary
from bench.report.wording import is_above


def first_per_runtime(grid: Grid) -> list[tuple[Setting, dict[str, Group]]]:
    """Return one setting a runtime: the first in which anything was measured."""
    first: dict[tuple[str, str, bool], tuple[Setting, dict[str, Group]]] = {}
    for setting, groups in grid.groups.items():
        if any(group.measured for group in groups.values()):
            first.setdefault((setting.environment, setting.runtime, setting.simulated), (setting, dict(groups)))
    return list(first.values())


def decisive(groups: Mapping[str, Group]) -> list[Summary]:
    """Return every subject's cell at one batch: the smallest at which some speed-up is above noise.

    Without one, the smallest at which a speed-up is known, else the smallest.
    """
    by_batch: dict[int, list[Summary]] = {}
    for group in groups.values():
        for cell in group.measured:
            by_batch.setdefault(cell.cell.batch, []).append(cell)
    rows = [by_batch[batch] for batch in sorted(by_batch)]
    telling = [row for row in rows if any(cell.speedup and is_above(cell.speedup, 1) for cell in row)]
    compared = [row for row in rows if any(cell.speedup for cell in row)]
    return (telling or compared or rows or [[]])[0]


def winner(row: Sequence[Summary]) -> Summary | None:
    """Return the cell with the largest speed-up, those above noise first; None where there is none."""
    gains = [(is_above(cell.speedup, 1), cell.speedup.value, cell) for cell in row if cell.speedup is not None]
    return max(gains, key=lambda item: item[:2])[2] if gains else None
