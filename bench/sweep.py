"""The verb `sweep`: options to a suite, a suite to a schedule, a schedule to a finished run. Imports no torch."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer

from bench import (
    devices,
    environment,
    filters,
    profiling,
    quality,
    run_folder,
    runner,
    runtime_rows,
    runtimes,
    schedule,
)
from bench.cells import Cell, Suite, check_suite, read_suite, suite_path
from bench.environment import Machine
from bench.measurement import Measurement
from bench.report import quantities
from bench.schedule import Planned, Schedule
from shortllama import console, files
from shortllama.errors import InputError, ShortllamaError


def sweep(
    suite: Annotated[
        str, typer.Argument(metavar="SUITE", help="A TOML file, or a shipped suite: quick, smoke.", show_default=False)
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="RUN", help="Folder of the run. Default: runs/<suite>_<device>_<date>.", show_default=False
        ),
    ] = None,
    runtime: Annotated[
        str | None, typer.Option(metavar="NAMES", help="Runtimes instead of the suite's, such as eager,static.")
    ] = None,
    budget: Annotated[
        str | None, typer.Option(metavar="SIZES", help="Memory budgets instead of the suite's, such as 24GiB,none.")
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(
            help="cpu, cuda, cuda:1, or a device to simulate, such as rtx3090. Default: CUDA if there is one."
        ),
    ] = None,
    timing: Annotated[
        str | None, typer.Option(help="careful (repeat until the interval is narrow) or paper (10 + 20 calls, mean).")
    ] = None,
    cells: Annotated[
        str | None, typer.Option(metavar="EXPR", help='Only these cells: "batch<=8 and runtime==eager".')
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Seed instead of the suite's.")] = None,
    timeout: Annotated[
        float | None,
        typer.Option(
            min=0.1, metavar="SECONDS", help="Give a cell up after this long. Default: 30 cell_seconds, >= 120."
        ),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with a run, or start it.")] = False,
    profile: Annotated[
        str | None,
        typer.Option(
            metavar="CELL", help="Write a torch trace of one cell (its id, or an expression); measure nothing."
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the cells with predictions; measure nothing.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")] = False,
) -> int:
    """Measure every cell of a suite until memory ends; out of memory is a result. Exit code 1 if a cell failed."""
    chosen, text = _suite(suite, runtime=runtime, budget=budget, timing=timing, seed=seed)
    machine = environment.machine(device)
    _check_device(chosen, machine, dry_run)
    plan = schedule.plan(chosen, machine.device, keep=filters.parse(cells) if cells else None)
    _check_fits(plan)
    if dry_run:
        _show(plan, as_json)
        return 0
    folder = out or run_folder.default(Path(suite).stem, machine.slug)
    if profile:
        return _profile(chosen, plan, machine, folder, profile, timeout, as_json)
    counts = measure(chosen, text, plan, machine, folder, resume=resume, timeout_s=timeout)
    if as_json:
        console.emit({"run": str(folder), "outcomes": dict(counts)})
    said = ", ".join(f"{count} {outcome}" for outcome, count in counts.items())
    console.say(f"wrote {folder}: {counts.total()} cells, {said}")
    return int(any(counts[outcome] for outcome in runner.BROKEN))


def _profile(
    suite: Suite, plan: Schedule, machine: Machine, folder: Path, cell: str, timeout_s: float | None, as_json: bool
) -> int:
    group, planned = profiling.choose(plan, cell)
    settings = _settings(suite, machine, timeout_s)
    with _preparing() as report:
        one = quality.prepare(Schedule((group,)), (), folder, seed=suite.seed, threads=settings.threads, report=report)
    found = profiling.profile(one.groups[0], planned, settings, folder)
    if as_json:
        console.emit({"cell_id": planned.cell_id, **msgspec.structs.asdict(found)})
    else:
        sys.stdout.write(profiling.text(found, planned) + "\n")
    return 0


def _settings(suite: Suite, machine: Machine, timeout_s: float | None) -> runner.Settings:
    from bench.runtimes import roofline

    script = msgspec.json.encode(roofline.script_from_environment()).decode()
    return runner.Settings(
        suite, machine, environment.threads(), timeout_s or runner.timeout_s(suite.cell_seconds), script
    )


def measure(
    suite: Suite,
    text: bytes,
    plan: Schedule,
    machine: Machine,
    folder: Path,
    *,
    resume: bool = False,
    timeout_s: float | None = None,
) -> Counter[str]:
    """Run a plan into a folder, pruning and evaluating its subjects first; return how often each outcome occurs."""
    settings = _settings(suite, machine, timeout_s)
    quality.check_weights(plan)
    new = run_folder.open_run(folder, suite, text, resume=resume)
    try:
        with _preparing() as report:
            plan = quality.prepare(
                plan, suite.perplexity, folder, seed=suite.seed, threads=settings.threads, report=report
            )
        with _watching(plan) as watcher:
            return runner.run(plan, settings, folder, watcher)
    except ShortllamaError:
        if new:
            run_folder.discard(folder)
        raise
    except KeyboardInterrupt:
        console.say(f"{folder}: keeps what was measured; go on with --resume")
        raise


def _suite(name: str, **changes: Any) -> tuple[Suite, bytes]:
    """The suite with the command's changes, and its document: the file itself where nothing is changed."""
    suite, path = read_suite(name), suite_path(name)
    fields: dict[str, Any] = {key: changes[key] for key in ("timing", "seed") if changes[key] is not None}
    for key, field in (("runtime", "runtimes"), ("budget", "budgets")):
        if changes[key] is not None:
            fields[field] = tuple(part.strip() for part in changes[key].split(","))
    changed = msgspec.structs.replace(suite, **fields)
    check_suite(changed, "the command line with " + str(path) if fields else str(path))
    return changed, files.read_bytes(path) if changed == suite else run_folder.to_toml(changed)


def _check_device(suite: Suite, machine: Machine, dry_run: bool) -> None:
    if machine.kind == "cuda" and machine.device.nominal and "roofline" in suite.runtimes:
        known = ", ".join(devices.names())
        raise InputError(f"runtime roofline cannot simulate {machine.name}; name a --device it knows: {known}")
    real = [name for name in suite.runtimes if name not in runtimes.SIMULATED]
    for name in real if machine.kind != "simulated" and not dry_run else ():
        refusal = runtime_rows.refusal(name, machine.kind)
        if refusal:
            raise InputError(refusal)
    if machine.kind == "simulated" and real and not dry_run:
        raise InputError(
            f"device {machine.place} is simulated and runtime {real[0]} needs a real one; "
            "give --runtime roofline, or --dry-run for predictions"
        )


def _check_fits(plan: Schedule) -> None:
    """Some subjects may be too large for a budget, and get their rows; where all are, nothing would be measured."""
    if all(schedule.impossible(group) for group in plan.groups):
        least = min(plan.groups, key=lambda group: group.subject.shape.weight_bytes(group.key.dtype))
        reason = schedule.impossible(least)
        raise InputError(f"nothing would be measured: {reason}; raise --budget, or choose smaller subjects")


# -- showing -----------------------------------------------------------------------------------------------------------


def _show(plan: Schedule, as_json: bool) -> None:
    if as_json:
        console.emit({"cells": [_plain(one) for one in plan.planned()]})
        return
    rows = [(one.cell.label, quantities.size(one.memory_bytes), _time(one), one.expected) for one in plan.planned()]
    heads = ("cell", "memory", "call", "expected")
    widths = [max(len(row[column]) for row in (*rows, heads)) for column in range(4)]
    for name, *figures in (heads, *rows):
        padded = (part.rjust(width) for part, width in zip(figures, widths[1:], strict=True))
        sys.stdout.write("  ".join((name.ljust(widths[0]), *padded)) + "\n")
    sys.stdout.write(f"{len(rows)} cells in {len(plan.groups)} groups, about {quantities.seconds(plan.seconds)}\n")


def _plain(one: Planned) -> dict[str, Any]:
    fields = msgspec.structs.asdict(one)
    return msgspec.structs.asdict(fields.pop("cell")) | fields


def _time(one: Planned) -> str:
    return quantities.MISSING if not one.call_s else quantities.seconds(one.call_s)


@contextmanager
def _preparing() -> Generator[quality.Report]:
    """Yield report(what, done, total) that shows a bar for each `what`."""
    with console.progress() as bar:
        tasks: dict[str, Any] = {}

        def report(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bar.add_task(what, total=total)
            bar.update(tasks[what], completed=done, total=total)

        yield report


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
