"""The verb `oom`: the largest batch of every subject, length, runtime and budget of a suite. Imports no torch."""

from __future__ import annotations

import sys
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import msgspec

from bench import requests, search
from bench.frontier import Ask, Trial
from bench.measurement import Frontier
from bench.report import quantities
from bench.schedule import Group, Schedule
from shortllama import console


def oom(
    suite: requests.SuiteName,
    out: requests.Out = None,
    runtime: requests.Runtimes = None,
    budget: requests.Budgets = None,
    device: requests.DeviceName = None,
    cells: requests.CellFilter = None,
    seed: requests.Seed = None,
    timeout: requests.Timeout = None,
    resume: requests.Resume = False,
    as_json: requests.AsJson = False,
) -> int:
    """Find the largest batch that fits, exactly: each side of it tried twice in fresh processes.

    The suite's batches are not used: --cells sees them all as 1. Exit code 1 if a search failed.
    """
    changes = {"runtime": runtime, "budget": budget, "timing": None, "seed": seed}
    request = requests.read(suite, device=device, cells=cells, batch=(1,), **changes)
    folder = request.folder(out)
    with requests.opened(request, folder, resume=resume):
        plan = requests.prepared(request, (), folder)
        with _watching(plan) as watch:
            found = search.run(plan, request.settings(timeout), folder, watch)
    if as_json:
        console.emit({"run": str(folder), "frontiers": [msgspec.to_builtins(row) for row in found]})
    else:
        sys.stdout.write("\n".join(table(found)) + "\n")
    console.say(f"wrote {folder}: {len(found)} {'frontier' if len(found) == 1 else 'frontiers'}")
    return int(any(row.largest_batch is None for row in found))


def table(found: list[Frontier]) -> list[str]:
    """Return the frontiers as lines of a table, with a note where one needs words."""
    heads = ("where", "largest batch", "predicted", "peak", "trials", "seconds")
    rows = [heads, *(_row(one) for one in found)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(heads))]
    lines = [
        "  ".join(
            (row[0].ljust(widths[0]), *(part.rjust(width) for part, width in zip(row[1:], widths[1:], strict=True)))
        )
        for row in rows
    ]
    notes = [f"{_where(one)}: {one.reason}" for one in found if one.reason]
    notes += [
        f"{_where(one)}: batches {one.unsteady} fit in one trial and not in another" for one in found if one.unsteady
    ]
    return [*lines, *notes]


def _row(row: Frontier) -> tuple[str, ...]:
    spent = None if row.trial_s is None else f"{row.trial_s:.1f} + {row.start_s or 0.0:.1f} starting"
    return (
        _where(row),
        quantities.MISSING if row.largest_batch is None else f"{row.largest_batch:,}",
        quantities.MISSING if row.predicted is None else f"{row.predicted:,}",
        quantities.MISSING if row.peak_bytes is None else quantities.size(row.peak_bytes),
        str(row.trials),
        spent or quantities.MISSING,
    )


def _where(row: Frontier) -> str:
    cell = row.cell
    budget = "" if cell.budget == "none" else f" budget {cell.budget}"
    return f"{cell.subject} {cell.runtime} {cell.dtype} P{cell.prompt} L{cell.output}{budget}"


@contextmanager
def _watching(plan: Schedule) -> Generator[search.Watch]:
    """Yield a watcher that shows which search is at which batch, and what is known so far."""
    from rich.progress import BarColumn, TextColumn, TimeElapsedColumn

    columns: tuple[Any, ...] = (
        TextColumn("{task.completed}/{task.total}"), BarColumn(), TimeElapsedColumn(), TextColumn("{task.description}"),
    )  # fmt: skip
    with console.progress(*columns) as bar:
        task = bar.add_task("starting", total=len(plan.groups))
        places = {group.key: place for place, group in enumerate(plan.groups)}

        def watch(group: Group, trials: tuple[Trial, ...], asked: Ask) -> None:
            fits = max((t.batch for t in trials if t.fits), default=0)
            fails = min((t.batch for t in trials if not t.fits), default=None)
            between = f"{fits} fits" + ("" if fails is None else f", {fails} does not")
            label = f"{group.key.subject} {group.key.runtime} L{group.key.output}: batch {asked.batch} ({between})"
            bar.update(task, completed=places[group.key], description=label)

        yield watch
