"""Rows of a results file from what a sweep knows: the plan of a cell, what its passes said, the machine. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean, median
from typing import Any

import msgspec

from bench import jobs, physics, runtimes
from bench.cells import Cell
from bench.environment import Machine
from bench.measurement import LARGEST_LINE_BYTES, Frontier, Measurement, Memory, SessionId
from bench.outcomes import Verdict
from bench.schedule import Group, Planned


class Heard(msgspec.Struct, frozen=True):
    """What became of one cell in one pass: a result, a verdict on why there is none, or both where it is doubtful."""

    planned: Planned
    session: str
    result: jobs.Finished | None = None
    verdict: Verdict | None = None
    wall_s: float | None = None
    telemetry: dict[str, Any] = {}


class Context(msgspec.Struct, frozen=True):
    """What all rows of a group share: the machine, the timing rule's name, the environment's id."""

    machine: Machine
    timing: str
    environment: str


def without_result(group: Group, planned: Planned, verdict: Verdict, context: Context) -> Measurement:
    """Return the row of a cell that was not measured."""
    cell = planned.cell
    return Measurement(
        cell=cell,
        cell_id=planned.cell_id,
        environment=context.environment,
        outcome=verdict.outcome,
        simulated=cell.runtime in runtimes.SIMULATED,
        session=SessionId(""),
        timing=context.timing,
        memory=Memory(analytic=planned.memory_bytes),
        reason=verdict.reason or None,
        emulated=emulated(cell, context.machine),
        subject_digest=group.subject.shape.digest(),
        parameters=group.subject.shape.parameters,
    )


def of(group: Group, heard: Heard, probed: Heard | None, context: Context) -> Measurement:
    """Return the row of a cell from what its last pass and, on a CPU, its memory pass before (`probed`) gave."""
    planned, result = heard.planned, heard.result
    spent = sum(one.wall_s or 0.0 for one in (heard, probed) if one)
    row = without_result(group, planned, heard.verdict or Verdict("ok", ""), context)
    row = msgspec.structs.replace(row, session=SessionId(heard.session), wall_s=round(spent, 3))
    held = probed.result if probed else result
    if held is not None:
        memory = msgspec.structs.replace(held.memory, analytic=planned.memory_bytes)
        row = msgspec.structs.replace(row, memory=memory)
    if result is None:
        return row
    shape, cell, device = group.subject.shape, planned.cell, context.machine.device
    bounds = physics.bounds(shape, cell, device, median(result.samples.call_s))
    row = msgspec.structs.replace(
        row,
        samples=result.samples,
        warm_up=result.warm_up,
        stop=result.stop,
        tokens=result.tokens,
        bounds=msgspec.structs.replace(bounds, ops_per_token=result.operations, kernel_s=result.kernel_s),
        graphs=result.graphs,
        telemetry=heard.telemetry,
    )
    return _fitting(row)


def _fitting(row: Measurement) -> Measurement:
    """The row with its steps thinned to means of neighbours, as far as it takes to fit its line."""
    while len(msgspec.json.encode(row)) >= LARGEST_LINE_BYTES and len(row.samples.step_s) > 1:
        steps = row.samples.step_s
        halved = tuple(float(f"{fmean(steps[at : at + 2]):.6g}") for at in range(0, len(steps), 2))
        row = msgspec.structs.replace(row, samples=msgspec.structs.replace(row.samples, step_s=halved))
    return row


def emulated(cell: Cell, machine: Machine) -> str | None:
    """Return how a memory budget was emulated, in words; None without a budget."""
    if cell.budget == "none":
        return None
    if cell.runtime in runtimes.SIMULATED:
        return f"{cell.budget} on a simulated {machine.device.name}"
    if machine.kind == "cpu":
        return f"{cell.budget} emulated on {machine.name}: RLIMIT_DATA in the memory pass; timed without the limit"
    return (
        f"{cell.budget} emulated on {machine.name}: kernels and bandwidth are this device's; how the budget was kept "
        "stands in memory.reasons"
    )


def frontier(group: Group, found: Sequence[Measurement], environment_id: str) -> Frontier:
    """Return the largest batch of a finished group, as far as the batches of its suite tell; `found`: its rows."""
    fits = tuple(row.cell.batch for row in found if row.outcome in ("ok", "unstable"))
    fails = tuple(row.cell.batch for row in found if row.outcome == "oom")
    ended = any(row.outcome in ("oom", "oom-implied") for row in found)
    reason = "among the batches of the suite"
    if not ended:
        reason = "no batch of the suite ran out of memory: a lower bound" if fits else "no cell was measured"
    return Frontier(
        cell=group.key,
        environment=environment_id,
        largest_batch=max(fits) if fits else (0 if ended else None),
        simulated=group.key.runtime in runtimes.SIMULATED,
        fits=fits,
        fails=fails,
        trials=len(fits) + len(fails),
        reason=reason,
    )
