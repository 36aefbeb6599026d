"""A paired experiment, as values and decisions: what it was to be, what is still open, what comes next. Pure.

Both sides of an experiment are runs like any other. What ties them together is written in the facts of their
environments, so the two files alone say how they were made, and `compare` can judge them as `ab` did.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import msgspec

from bench.cells import Cell
from bench.measurement import Environment, Measurement
from bench.sequential import FULL, Looks
from bench.store import Results
from bench.telemetry import throttling
from shortllama.errors import InputError

FACT = "experiment"  # in an environment's facts
SIDES = ("base", "head")
TRIES = 3  # of a pair that was throttled, before the experiment gives up


class Design(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What was decided before measuring, the same on both sides. `base`, `head`: what they are, in words.

    `by_subject`: the sides are two subjects, so their cells pair up without it. `notes`: what a reader of the verdict
    must know, such as a worktree with changes in no commit.
    """

    id: str
    base: str
    head: str
    looks: Looks = FULL
    by_subject: bool = False
    notes: tuple[str, ...] = ()


def signed(environment: Environment, design: Design) -> Environment:
    """Return the environment with the experiment in its facts."""
    facts = environment.facts | {FACT: msgspec.to_builtins(design)}
    return msgspec.structs.replace(environment, facts=facts)


def common(base: Results, head: Results) -> Design | None:
    """Return the experiment that both runs belong to; None where they do not belong to one."""
    designs = [_design(results) for results in (base, head)]
    return designs[0] if designs[0] == designs[1] else None


def _design(results: Results) -> Design | None:
    found: Any = next((one.facts[FACT] for one in results.environments.values() if FACT in one.facts), None)
    if found is None:
        return None
    try:
        return msgspec.convert(found, Design)
    except msgspec.ValidationError as error:
        raise InputError(f"{results.path}: the experiment in its environment cannot be read: {error}") from None


# -- what comes next --------------------------------------------------------------------------------------------------


def order(pair: int) -> tuple[str, str]:
    """Return the sides of a pair (from 1) in running order: base first in odd pairs, so that drift cancels."""
    return SIDES if pair % 2 else (SIDES[1], SIDES[0])


def order_name(pair: int) -> str:
    """Return the order as rows hold it: AB or BA."""
    return "AB" if pair % 2 else "BA"


def throttled(rows: Iterable[Measurement]) -> str | None:
    """Return why a pair with these rows must be measured again; None where nothing speaks against it."""
    for row in rows:
        if row.outcome == "unstable":
            return f"{row.cell.label}: {row.reason or 'unstable'}"
        reason = throttling.spoiled(row.telemetry)
        if reason:
            return f"{row.cell.label}: {reason}"
    return None


def open_cells(cells: Iterable[Cell], verdicts: Mapping[str, str], pairs: int, looks: Looks) -> tuple[Cell, ...]:
    """Return the cells that the next pair must measure, none where the experiment is over.

    `verdicts`: by cell id, those of the metric that decides after `pairs` pairs; before the first look all are
    inconclusive. A cell without one did not run on a side, and need not be tried again.
    """
    if pairs == 0:
        return tuple(cells)
    if pairs >= looks.most:
        return ()
    return tuple(cell for cell in cells if verdicts.get(cell.id) == "inconclusive")


def whole_pairs(base: Iterable[Measurement], head: Iterable[Measurement]) -> int:
    """Return how many pairs, counted from 1, both sides hold with equally many rows; what follows is of a kill."""
    before, after = (Counter(row.session.pair for row in rows) for rows in (base, head))
    count = 0
    while before[count + 1] == after[count + 1] > 0:
        count += 1
    return count
