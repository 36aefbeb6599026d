"""What a sweep will run, in order, before anything runs: groups, cells, predicted memory and time. Pure.

Groups that differ only in subject run back to back in seeded order, so that subjects are paired in time; prompts and
outputs ascend, and the batch ascends within a group, so that an out-of-memory cell is met before those it dominates.
An open batch range is cut by the memory model, generously: a cell that the model calls impossible is tried, and larger
ones are implied by what happened, not by what was predicted.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import groupby

import msgspec

from bench import memory, prediction, runtimes, timing
from bench.cells import Cell, Suite, budget_bytes, expand
from bench.devices import Device
from bench.fitting import Factors
from bench.measurement import Measurement
from bench.subjects import Subject, resolve_all
from bench.telemetry import loop
from shortllama.errors import InputError

# An open range ends at the first batch predicted to need this many times the limit: the model's own error, and room
# for a runtime that needs less than predicted, are well inside.
BEYOND = 1.5


class Planned(msgspec.Struct, frozen=True):
    """One cell with its predictions. `expected`: ok, oom (predicted over the limit) or oom-implied (dominated by such).

    `call_s`: one generation, `cell_s`: with warm-up, repeats and telemetry; both 0 where the cell is expected not to
    run, and None where the device table has no rate for its dtype.
    """

    cell: Cell
    cell_id: str
    memory_bytes: int
    call_s: float | None
    cell_s: float | None
    expected: str


class Group(msgspec.Struct, frozen=True):
    """Cells that share a child process: `key` is the cell at batch 0, `limit_bytes` the memory they may use."""

    key: Cell
    subject: Subject
    limit_bytes: int
    cells: tuple[Planned, ...]


class Schedule(msgspec.Struct, frozen=True):
    """All groups in running order."""

    groups: tuple[Group, ...]

    def planned(self) -> Iterator[Planned]:
        """Yield every cell in running order."""
        for group in self.groups:
            yield from group.cells

    @property
    def seconds(self) -> float:
        """Predicted seconds of all cells, without process starts."""
        return sum(one.cell_s or 0.0 for one in self.planned())


def plan(
    suite: Suite,
    device: Device,
    *,
    keep: Callable[[Cell], bool] | None = None,
    subjects: Mapping[str, Subject] | None = None,
    factors: Factors | None = None,
) -> Schedule:
    """Return the schedule of `suite` on `device`; `keep` chooses among its cells.

    `subjects` are resolved from their names unless given; `factors` predict times instead of those that are shipped,
    where they have the runtime and dtype. Raises InputError for a subject that is not understood, and
    where `keep` leaves nothing.
    """
    found = resolve_all(suite.subjects) if subjects is None else subjects
    suite = msgspec.structs.replace(suite, subjects=tuple(found))
    clock = _Clock(device, timing.rule(suite.timing, suite.cell_seconds), factors or {})
    open_ended = not isinstance(suite.batch, tuple) and suite.batch.until == "oom"
    groups = [
        _group(key, cells, found[key.subject], clock, keep, open_ended)
        for key, cells in groupby(expand(suite), key=_key)
    ]
    groups = [_looped(group, device) if suite.telemetry else group for group in groups if group.cells]
    if not groups:
        raise InputError("the cell filter leaves no cell of the suite; widen --cells")
    return Schedule(_imply(_ordered(suite, groups)))


class _Clock(msgspec.Struct, frozen=True):
    """What predicts times: a device, a timing rule, and factors that replace the shipped ones."""

    device: Device
    rule: timing.Rule
    factors: Factors

    def seconds(self, cell: Cell, subject: Subject) -> tuple[float, float] | tuple[None, None]:
        """Return the predicted seconds of one call and of the whole cell; None where the dtype's rate is unknown."""
        if cell.dtype not in self.device.flops:
            return None, None
        given = self.factors.get((cell.runtime, cell.dtype))
        call = prediction.call_s(subject.shape, cell, self.device, given)
        return call, prediction.cell_s(call, self.rule)


def _looped(group: Group, device: Device) -> Group:
    """The group with the time in which its cells are called again for the sampler; simulated ones are not."""
    if group.key.runtime in runtimes.SIMULATED:
        return group
    seconds = loop.SECONDS["cpu" if device.short == "cpu" else "cuda"]
    cells = tuple(
        msgspec.structs.replace(one, cell_s=one.cell_s + max(one.call_s, seconds)) if one.cell_s and one.call_s else one
        for one in group.cells
    )
    return msgspec.structs.replace(group, cells=cells)


def _key(cell: Cell) -> Cell:
    return cell.group if cell.batch else cell


def _group(
    key: Cell,
    cells: Iterable[Cell],
    subject: Subject,
    clock: _Clock,
    keep: Callable[[Cell], bool] | None,
    open_ended: bool,
) -> Group:
    budget = budget_bytes(key.budget)
    limit = clock.device.memory_bytes if budget is None else min(budget, clock.device.memory_bytes)
    planned: list[Planned] = []
    for cell in cells:
        size = memory.of_cell(subject.shape, cell)
        if keep is None or keep(cell):
            call, spent = clock.seconds(cell, subject) if size <= limit else (0.0, 0.0)
            planned.append(Planned(cell, cell.id, size, call, spent, "ok" if size <= limit else "oom"))
        if open_ended and size > BEYOND * limit:
            break
    return Group(key, subject, limit, tuple(planned))


def _ordered(suite: Suite, groups: list[Group]) -> list[Group]:
    """Sets of groups in the suite's order of runtimes and budgets, lengths ascending; subjects shuffled in each set."""

    def place(group: Group) -> tuple[int, int, int, int, int, int]:
        key = group.key
        return (
            suite.runtimes.index(key.runtime),
            suite.dtypes.index(key.dtype),
            suite.attention.index(key.attention),
            suite.budgets.index(key.budget),
            key.prompt,
            key.output,
        )

    ordered: list[Group] = []
    for where, members in groupby(sorted(groups, key=place), key=place):
        together = list(members)
        random.Random(f"{suite.seed} {where}").shuffle(together)
        ordered.extend(together)
    return ordered


def impossible(group: Group) -> str | None:
    """Return why no cell of a group can fit, in words: its weights alone exceed its memory. None where they do not."""
    weights = group.subject.shape.weight_bytes(group.key.dtype)
    if weights <= group.limit_bytes:
        return None
    where = "the device" if group.key.budget == "none" else f"the budget {group.key.budget}"
    return (
        f"the weights of {group.subject.name} in {group.key.dtype} are {weights / (1 << 30):.2f} GiB, "
        f"{where} has {group.limit_bytes / (1 << 30):.2f} GiB"
    )


# -- out of memory, implied --------------------------------------------------------------------------------------------


class Witnesses:
    """The out-of-memory cells met so far; answers which later cells they imply.

    A cell is implied by one of the same subject, runtime, dtype, attention and budget that needs no more: batch, prompt
    and output each at most the cell's own.
    """

    def __init__(self, rows: Iterable[Measurement] = ()) -> None:
        self._met: dict[tuple[str, ...], list[Cell]] = {}
        for row in rows:
            if row.outcome == "oom":
                self.add(row.cell)

    def add(self, cell: Cell) -> None:
        """Remember an out-of-memory cell."""
        self._met.setdefault(_family(cell), []).append(cell)

    def of(self, cell: Cell) -> Cell | None:
        """Return a remembered cell that implies `cell`, or None."""
        for witness in self._met.get(_family(cell), ()):
            if witness.batch <= cell.batch and witness.prompt <= cell.prompt and witness.output <= cell.output:
                return witness
        return None


def _family(cell: Cell) -> tuple[str, ...]:
    return cell.subject, cell.runtime, cell.dtype, cell.attention, cell.budget


def _imply(groups: Iterable[Group]) -> tuple[Group, ...]:
    """Mark the cells that would be implied if every prediction came true, in running order."""
    witnesses = Witnesses()
    marked: list[Group] = []
    for group in groups:
        cells: list[Planned] = []
        for one in group.cells:
            if one.expected == "oom" and witnesses.of(one.cell):
                one = msgspec.structs.replace(one, expected="oom-implied")
            elif one.expected == "oom":
                witnesses.add(one.cell)
            cells.append(one)
        marked.append(msgspec.structs.replace(group, cells=tuple(cells)))
    return tuple(marked)


# -- resume ------------------------------------------------------------------------------------------------------------


def remaining(schedule: Schedule, done: Iterable[str]) -> Schedule:
    """Return what is left of `schedule` when the cells with the ids `done` have their rows; order kept."""
    finished = frozenset(done)
    groups: list[Group] = []
    for group in schedule.groups:
        cells = tuple(one for one in group.cells if one.cell_id not in finished)
        if cells:
            groups.append(msgspec.structs.replace(group, cells=cells))
    return Schedule(tuple(groups))
