"""What a sweep would do, in words and as JSON: cells with predicted memory, latency and throughput, and where memory
ends for each group. Pure but for printing."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

import msgspec

from bench import memory
from bench.calibrated import Calibration
from bench.report import quantities
from bench.schedule import Group, Planned, Schedule
from shortllama import console

HEADS = ("cell", "memory", "call", "tokens/s", "expected")
ENDS = ("largest batch that fits, by the memory model", "batch", "limit")


def show(plan: Schedule, by: Calibration | None, *, as_json: bool) -> None:
    """Print the schedule."""
    if as_json:
        console.emit(document(plan, by))
    else:
        sys.stdout.write("\n".join(lines(plan, by)) + "\n")


def document(plan: Schedule, by: Calibration | None) -> dict[str, Any]:
    """Return the schedule as one JSON document."""
    found: dict[str, Any] = {
        "cells": [_plain(one) for one in plan.planned()],
        "frontiers": [
            {**msgspec.structs.asdict(one.key), "largest_batch": largest(one), "limit_bytes": one.limit_bytes}
            for one in plan.groups
        ],
        "calibration": None,
    }
    if by is not None:
        factors = [
            {"runtime": runtime, "dtype": dtype, **msgspec.structs.asdict(one)}
            for (runtime, dtype), one in by.factors.items()
        ]
        unseen = None if by.unseen is None else msgspec.structs.asdict(by.unseen)
        found["calibration"] = {
            "measured_on": by.measured_on, "cells": by.cells, "error_on_unseen_cells": unseen, "factors": factors
        }  # fmt: skip
    return found


def lines(plan: Schedule, by: Calibration | None) -> list[str]:
    """Return the schedule for people."""
    cells = [
        (one.cell.label, quantities.size(one.memory_bytes), _time(one), _rate(one), one.expected)
        for one in plan.planned()
    ]
    said = _table((HEADS, *cells))
    said.append(f"{len(cells)} cells in {len(plan.groups)} groups, about {quantities.seconds(plan.seconds)}")
    limits = [(_name(one), f"{largest(one):,}", quantities.size(one.limit_bytes)) for one in plan.groups]
    said += ["", *_table((ENDS, *limits))]
    if by is not None:
        said += ["", _calibration(plan, by)]
    return said


def largest(group: Group) -> int:
    """Return the largest batch of a group that the memory model lets fit; 0 where not even one does."""
    return memory.largest_of(group.subject.shape, group.key, group.limit_bytes)


def throughput(one: Planned) -> float | None:
    """Return predicted new tokens a second, all sequences together; None where the cell is not expected to run."""
    return one.cell.batch * one.cell.output / one.call_s if one.call_s else None


def _plain(one: Planned) -> dict[str, Any]:
    fields = msgspec.structs.asdict(one)
    return msgspec.structs.asdict(fields.pop("cell")) | fields | {"tokens_per_s": throughput(one)}


def _time(one: Planned) -> str:
    return quantities.MISSING if not one.call_s else quantities.seconds(one.call_s)


def _rate(one: Planned) -> str:
    rate = throughput(one)
    return quantities.MISSING if rate is None else quantities.significant(rate)


def _name(group: Group) -> str:
    key = group.key
    budget = "" if key.budget == "none" else f" budget {key.budget}"
    return f"{key.subject} {key.runtime} {key.dtype} P{key.prompt} L{key.output}{budget}"


def _calibration(plan: Schedule, by: Calibration) -> str:
    """Say where times come from, and what they were worth where that could be tested."""
    lacking = sorted({one.key.runtime for one in plan.groups if (one.key.runtime, one.key.dtype) not in by.factors})
    said = f"times by {by.cells} cells measured on {by.measured_on}"
    if by.unseen is not None:
        typical, worst = quantities.ratio(by.unseen.typical), quantities.ratio(by.unseen.worst)
        said += f"; on cells left out of the fit within {typical} for half of them, {worst} at worst"
    return said + (f"; {', '.join(lacking)} by the shipped factors" if lacking else "")


def _table(rows: Iterable[tuple[str, ...]]) -> list[str]:
    rows = list(rows)
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join(
            (row[0].ljust(widths[0]), *(part.rjust(width) for part, width in zip(row[1:], widths[1:], strict=True)))
        )
        for row in rows
    ]
