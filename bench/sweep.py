"""The verb `sweep`: options to a suite, a suite to a schedule, a schedule to a finished run. Imports no torch."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import msgspec
import typer

from bench import dry_runs, profiling, requests, runner
from bench.cells import Cell
from bench.measurement import Measurement
from bench.requests import Request
from bench.schedule import Schedule
from shortllama import console
from shortllama.errors import InputError


def sweep(
    suite: requests.SuiteName,
    out: requests.Out = None,
    runtime: requests.Runtimes = None,
    budget: requests.Budgets = None,
    device: requests.DeviceName = None,
    timing: Annotated[
        str | None, typer.Option(help="careful (repeat until the interval is narrow) or paper (10 + 20 calls, mean).")
    ] = None,
    cells: requests.CellFilter = None,
    seed: requests.Seed = None,
    timeout: requests.Timeout = None,
    telemetry: Annotated[
        bool | None,
        typer.Option(
            "--telemetry/--no-telemetry",
            help="After timing a cell, call it for 2 s more (4.5 s on CUDA) to read power, clocks and load. Default: "
            "the suite's, else not.",
            show_default=False,
        ),
    ] = None,
    resume: requests.Resume = False,
    profile: Annotated[
        str | None,
        typer.Option(
            metavar="CELL", help="Write a torch trace of one cell (its id, or an expression); measure nothing."
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the cells with predictions; measure nothing.")
    ] = False,
    calibrated_by: Annotated[
        Path | None,
        typer.Option(metavar="RUN", help="With --dry-run: predict times by factors fitted to this run's cells."),
    ] = None,
    as_json: requests.AsJson = False,
) -> int:
    """Measure every cell of a suite until memory ends; out of memory is a result. Exit code 1 if a cell failed."""
    changes = {"runtime": runtime, "budget": budget, "timing": timing, "seed": seed, "telemetry": telemetry}
    if calibrated_by and not dry_run:
        raise InputError(f"--calibrated-by {calibrated_by} is for predictions; add --dry-run, or leave it out")
    request = requests.read(suite, device=device, cells=cells, dry_run=dry_run, calibrated_by=calibrated_by, **changes)
    if dry_run:
        dry_runs.show(request.plan, request.calibration, as_json=as_json)
        return 0
    folder = request.folder(out)
    if profile:
        return _profile(request, folder, profile, timeout, as_json)
    counts = measure(request, folder, resume=resume, timeout_s=timeout)
    if as_json:
        console.emit({"run": str(folder), "outcomes": dict(counts)})
    said = ", ".join(f"{count} {outcome}" for outcome, count in counts.items())
    console.say(f"wrote {folder}: {counts.total()} cells, {said}")
    return int(any(counts[outcome] for outcome in runner.BROKEN))


def measure(request: Request, folder: Path, *, resume: bool = False, timeout_s: float | None = None) -> Counter[str]:
    """Run what is asked for into a folder, pruning and evaluating subjects first; return the count of each outcome."""
    with requests.opened(request, folder, resume=resume):
        plan = requests.prepared(request, request.suite.perplexity, folder)
        with _watching(plan) as watcher:
            return runner.run(plan, request.settings(timeout_s), folder, watcher)


def _profile(request: Request, folder: Path, cell: str, timeout_s: float | None, as_json: bool) -> int:
    group, planned = profiling.choose(request.plan, cell)
    plan = requests.prepared(request, (), folder, Schedule((group,)))
    found = profiling.profile(plan.groups[0], planned, request.settings(timeout_s), folder)
    if as_json:
        console.emit({"cell_id": planned.cell_id, **msgspec.structs.asdict(found)})
    else:
        sys.stdout.write(profiling.text(found, planned) + "\n")
    return 0


# -- showing -----------------------------------------------------------------------------------------------------------


@contextmanager
def _watching(plan: Schedule) -> Generator[runner.Watcher]:
    """Yield a watcher that shows the current cell, cells done, and the time left by the predicted times."""
    from rich.progress import BarColumn, TextColumn, TimeRemainingColumn

    weights = {one.cell_id: max(one.cell_s or 0.0, 0.1) for one in plan.planned()}
    columns = (TextColumn("{task.fields[count]}"), BarColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
    with console.progress(*columns) as bar:
        task = bar.add_task("starting", total=sum(weights.values()), count="")

        class Shown(runner.Watcher):
            """Updates the bar."""

            done = 0

            def began(self, cell: Cell) -> None:
                bar.update(task, description=cell.label)

            def finished(self, row: Measurement) -> None:
                self.done += 1
                bar.update(task, advance=weights.get(row.cell_id, 0.0), count=f"{self.done}/{len(weights)}")

        yield Shown()
