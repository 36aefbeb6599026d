"""The order of events of a paired experiment: sessions in turn, a pair on disk when both are there. Reads no clock.

A kill costs the pair that was being measured: what it left is cut off, and the next start goes on. How a session is
run is the caller's: the tests put a simulated one in its place.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec

from bench import comparison, environment, experiment, store
from bench.cells import Cell
from bench.comparison import Comparison
from bench.experiment import Design
from bench.measurement import Environment, SessionId
from bench.metrics import LATENCY
from bench.store import Results
from shortllama import files
from shortllama.errors import IncomparableError

Session = Callable[[str, Sequence[Cell]], Results]  # (side, cells) -> the rows of one session


def conduct(
    design: Design,
    cells: Sequence[Cell],
    folder: Path,
    environments: dict[bool, Environment],
    session: Session,
    tell: Callable[[str], None] = lambda words: None,
) -> Comparison:
    """Measure pairs into `folder` until every cell is clear or the pairs are spent; return the comparison.

    Raises IncomparableError where a pair was throttled as often as it was tried, and where the pairs that are there
    come from another environment.
    """
    known = _whole(folder)
    signed = {kind: experiment.signed(one, design) for kind, one in environments.items()}
    for results in known or ():
        _check(results, signed)
    while True:
        found = comparison.compare(*known) if known else None
        count = experiment.whole_pairs(*(one.measurements for one in known)) if known else 0
        verdicts = {
            change.cell_id: change.decision.verdict
            for change in (found.changes if found else ())
            if change.metric == LATENCY.name
        }
        wanted = experiment.open_cells(cells, verdicts, count, design.looks)
        if found and not wanted:
            return found
        _measure_pair(count + 1, wanted, folder, signed, session, tell)
        known = _whole(folder)


def _measure_pair(
    number: int,
    cells: Sequence[Cell],
    folder: Path,
    environments: dict[bool, Environment],
    session: Session,
    tell: Callable[[str], None],
) -> None:
    """Measure one pair, again where the device throttled, and write it."""
    reason = None
    for _ in range(experiment.TRIES):
        found: dict[str, Results] = {}
        for side in experiment.order(number):
            again = f", again: {reason}" if reason else ""
            tell(f"pair {number}: {side}, {len(cells)} cell{'s' * (len(cells) != 1)}{again}")
            found[side] = session(side, cells)
        reason = experiment.throttled(row for one in found.values() for row in one.measurements)
        if reason is None:
            for side, results in found.items():
                _write(folder / side, results, number, environments)
            return
    raise IncomparableError(
        f"pair {number} was throttled {experiment.TRIES} times ({reason}); let the device cool or end other work on "
        "it, then go on with --resume"
    )


def _write(run: Path, results: Results, number: int, environments: dict[bool, Environment]) -> None:
    """Append a session's rows to a side; largest batches are those of the first pair, which runs all cells."""
    with store.Writer(run) as writer:
        for one in environments.values():
            writer.write(one)
        for row in results.measurements:
            session = SessionId(row.session.id, number, experiment.order_name(number))
            where = environments[row.simulated].id
            writer.write(msgspec.structs.replace(row, session=session, environment=where))
        for end in results.frontiers if number == 1 else ():
            writer.write(msgspec.structs.replace(end, environment=environments[end.simulated].id))


def _whole(folder: Path) -> tuple[Results, Results] | None:
    """What both sides hold, after cutting off what a kill left of a pair; None where there is no pair yet."""
    for side in experiment.SIDES:
        if (folder / side / store.FILE_NAME).exists():
            store.Writer(folder / side).close()  # mends a torn last line
    base, head = (_rows(folder / side) for side in experiment.SIDES)
    count = experiment.whole_pairs(base.measurements, head.measurements) if base and head else 0
    for results in (base, head):
        if results and any(row.session.pair > count for row in results.measurements):
            kept = [row for row in results.measurements if row.session.pair <= count]
            rows = (*results.environments.values(), *kept, *(results.frontiers if count else ()))
            files.write_atomically(results.path, b"".join(map(store.encode, rows)))
    if not count:
        return None
    again = [store.read(folder / side) for side in experiment.SIDES]
    return again[0], again[1]


def _rows(run: Path) -> Results | None:
    file = run / store.FILE_NAME
    return store.read(run) if file.exists() and b'"kind":"measurement"' in files.read_bytes(file) else None


def _check(results: Results, environments: dict[bool, Environment]) -> None:
    for one in results.environments.values():
        now = environments.get(bool(one.fingerprint.get("simulated")))
        if now is not None and now.id != one.id:
            raise IncomparableError(
                f"{results.path}: was measured elsewhere ({environment.differences(one, now)}); give another --out"
            )
