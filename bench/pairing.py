"""Which rows of two runs belong together, and whether their times may be compared. Pure.

Cells pair up by id; those of an experiment between two subjects by the cell without its subject. Times compare within
one environment only; simulated rows never meet measured ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import msgspec

from bench.cells import Cell
from bench.experiment import Design
from bench.measurement import Environment, Frontier, Measurement
from bench.store import Results
from shortllama.errors import IncomparableError, InputError


class Pair(msgspec.Struct, frozen=True):
    """The rows of one cell in both runs; `comparable`: their environments allow to compare times."""

    cell_id: str
    cell: Cell
    base: tuple[Measurement, ...]
    head: tuple[Measurement, ...]
    comparable: bool

    @property
    def simulated(self) -> bool:
        """Whether the rows come from the simulator."""
        return self.base[0].simulated


class Ends(msgspec.Struct, frozen=True):
    """The largest batches of one group in both runs; `open_base`, `open_head`: no batch of that run failed, so the
    value is a lower bound."""

    cell: Cell
    base: Frontier
    head: Frontier
    open_base: bool
    open_head: bool
    comparable: bool


class Pairs(msgspec.Struct, frozen=True):
    """What two runs have in common, in the base's order, and how many cells each has alone."""

    cells: tuple[Pair, ...]
    ends: tuple[Ends, ...]
    base_only: int
    head_only: int


def pair(base: Results, head: Results, design: Design | None = None) -> Pairs:
    """Return what belongs together.

    Raises InputError where nothing does or a sample is not positive, IncomparableError where a simulated row meets a
    measured one.
    """
    key = _without_subject if design and design.by_subject else _itself
    left, right = (_by_key(results, key) for results in (base, head))
    before, after = ({key(row.cell): row for row in results.frontiers} for results in (base, head))
    common = [one for one in left if one in right]
    both = [one for one in before if one in after]
    if not common and not both:
        raise InputError(f"{base.path} and {head.path} have no cell in common; compare two runs of the same suite")
    bounded = [_bounded(results) for results in (base, head)]
    return Pairs(
        tuple(_pair(left[one], right[one]) for one in common),
        tuple(_ends(before[one], after[one], bounded) for one in both),
        len(left) - len(common),
        len(right) - len(common),
    )


def _itself(cell: Cell) -> Cell:
    return cell


def _without_subject(cell: Cell) -> Cell:
    return msgspec.structs.replace(cell, subject="")


def _by_key(results: Results, key: Callable[[Cell], Cell]) -> dict[Cell, tuple[Measurement, ...]]:
    rows: dict[Cell, list[Measurement]] = {}
    for row in results.measurements:
        values = (*row.samples.call_s, *row.samples.prefill_s, *row.samples.step_s)
        if values and min(values) <= 0:
            raise InputError(
                f"{results.path}: {row.cell.label} ({row.cell_id}) has a sample of {min(values)} s; times are positive"
            )
        rows.setdefault(key(row.cell), []).append(row)
    return {one: tuple(found) for one, found in rows.items()}


def _pair(base: tuple[Measurement, ...], head: tuple[Measurement, ...]) -> Pair:
    cell = _joint(base[0].cell, head[0].cell)
    kinds = {row.simulated for row in (*base, *head)}
    if len(kinds) > 1:
        raise _mixed(cell)
    environments = {row.environment for row in (*base, *head)}
    return Pair(base[0].cell_id, cell, base, head, kinds == {True} or len(environments) == 1)


def _mixed(cell: Cell) -> IncomparableError:
    return IncomparableError(f"{cell.label}: simulated on one side and measured on the other; compare like with like")


def _joint(base: Cell, head: Cell) -> Cell:
    """The cell as the comparison names it."""
    if base.subject == head.subject:
        return base
    return msgspec.structs.replace(base, subject=f"{base.subject} -> {head.subject}")


# -- largest batches --------------------------------------------------------------------------------------------------


def _bounded(results: Results) -> set[Cell]:
    """The groups in which a cell ran out of memory, or was implied to."""
    return {row.cell.group for row in results.measurements if row.outcome in ("oom", "oom-implied")}


def _ends(base: Frontier, head: Frontier, bounded: Sequence[set[Cell]]) -> Ends:
    cell = _joint(base.cell, head.cell)
    if base.simulated != head.simulated:
        raise _mixed(cell)
    opens = [
        bool(row.fits) and not row.fails and row.cell.group not in known
        for row, known in zip((base, head), bounded, strict=True)
    ]
    comparable = base.simulated or base.environment == head.environment
    return Ends(cell, base, head, opens[0], opens[1], comparable)


# -- environments -----------------------------------------------------------------------------------------------------


def differing(pairs: Pairs, base: Mapping[str, Environment], head: Mapping[str, Environment]) -> tuple[str, ...]:
    """Return each field that differs between the environments of rows that cannot be compared, with both values."""
    met = {
        tuple(dict.fromkeys(row.environment for row in (*one.base, *one.head))): None
        for one in pairs.cells
        if not one.comparable
    }
    met |= {(one.base.environment, one.head.environment): None for one in pairs.ends if not one.comparable}
    fields: dict[str, None] = {}
    for ids in met:
        first, *others = ((base.get(one) or head[one]).fingerprint for one in ids)
        for other in others:
            fields |= dict.fromkeys(_fields(first, other))
    return tuple(fields)


def _fields(first: Mapping[str, object], other: Mapping[str, object]) -> Iterable[str]:
    for key in sorted(first.keys() | other.keys()):
        if first.get(key) != other.get(key):
            yield f"{key}: {first.get(key)} -> {other.get(key)}"
