"""What a measuring command was asked for: shared options, and from them a suite, a machine, a schedule. Torch-free."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer

from bench import (
    calibrated,
    devices,
    environment,
    filters,
    quality,
    run_folder,
    runner,
    runtime_rows,
    runtimes,
    schedule,
)
from bench.calibrated import Calibration
from bench.cells import Suite, check_suite, read_suite, suite_path
from bench.environment import Machine
from bench.schedule import Schedule
from shortllama import console, files
from shortllama.errors import InputError, ShortllamaError

SuiteName = Annotated[
    str, typer.Argument(metavar="SUITE", help="A TOML file, or a shipped suite, such as quick.", show_default=False)
]
Out = Annotated[
    Path | None,
    typer.Option(metavar="RUN", help="Folder of the run. Default: runs/<suite>_<device>_<date>.", show_default=False),
]
Runtimes = Annotated[
    str | None, typer.Option(metavar="NAMES", help="Runtimes instead of the suite's, such as eager,static.")
]
Budgets = Annotated[
    str | None, typer.Option(metavar="SIZES", help="Memory budgets instead of the suite's, such as 24GiB,none.")
]
DeviceName = Annotated[
    str | None,
    typer.Option(help="cpu, cuda, cuda:1, or a device to simulate, such as rtx3090. Default: CUDA if there is one."),
]
CellFilter = Annotated[
    str | None, typer.Option(metavar="EXPR", help='Only these cells: "batch<=8 and runtime==eager".')
]
Seed = Annotated[int | None, typer.Option(help="Seed instead of the suite's.")]
Timeout = Annotated[
    float | None,
    typer.Option(min=0.1, metavar="SECONDS", help="Give a cell up after this long. Default: 30 cell_seconds, >= 120."),
]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with a run, or start it.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]


class Request(msgspec.Struct, frozen=True):
    """A suite with the command's changes, its document, the machine, and the schedule there.

    `calibration`: what predicted the schedule's times, None for the shipped factors.
    """

    name: str
    suite: Suite
    text: bytes
    machine: Machine
    plan: Schedule
    calibration: Calibration | None = None

    def folder(self, out: Path | None) -> Path:
        """Return the run's folder: the one given, or the one named by suite, device and date."""
        return out or run_folder.default(Path(self.name).stem, self.machine.slug)

    def settings(self, timeout_s: float | None) -> runner.Settings:
        """Return how to run the schedule."""
        from bench.runtimes import roofline

        script = msgspec.json.encode(roofline.script_from_environment()).decode()
        limit = timeout_s or runner.timeout_s(self.suite.cell_seconds)
        return runner.Settings(self.suite, self.machine, environment.threads(), limit, script)


def read(
    name: str,
    *,
    device: str | None,
    cells: str | None = None,
    dry_run: bool = False,
    batch: tuple[int, ...] | None = None,
    calibrated_by: Path | None = None,
    **changes: Any,
) -> Request:
    """Return what is asked for; `changes`: runtime, budget, timing, seed, telemetry, None where the suite's own holds.

    Raises InputError for what is not understood, what this machine cannot do, and where no subject fits its memory.
    """
    suite, text = _suite(name, **changes)
    machine = environment.machine(device)
    _check_device(suite, machine, dry_run)
    gridded = suite if batch is None else msgspec.structs.replace(suite, batch=batch)
    by = calibrated.read(calibrated_by, machine) if calibrated_by else None
    keep = filters.parse(cells) if cells else None
    plan = schedule.plan(gridded, by.device if by else machine.device, keep=keep, factors=by.factors if by else None)
    _check_fits(plan)
    return Request(name, suite, text, machine, plan, by)


def _suite(name: str, **changes: Any) -> tuple[Suite, bytes]:
    """The suite with the command's changes, and its document: the file itself where nothing is changed."""
    suite, path = read_suite(name), suite_path(name)
    asked = ("timing", "seed", "telemetry")
    fields: dict[str, Any] = {key: changes[key] for key in asked if changes.get(key) is not None}
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


# -- running ---


@contextmanager
def opened(request: Request, folder: Path, *, resume: bool) -> Generator[None]:
    """Make `folder` the request's run for the time of the context; a new run in which nothing was measured is removed
    where an error ends it."""
    quality.check_weights(request.plan)
    new = run_folder.open_run(folder, request.suite, request.text, resume=resume)
    try:
        yield
    except ShortllamaError:
        if new:
            run_folder.discard(folder)
        raise
    except KeyboardInterrupt:
        console.say(f"{folder}: keeps what was measured; go on with --resume")
        raise


def prepared(request: Request, texts: tuple[str, ...], folder: Path, plan: Schedule | None = None) -> Schedule:
    """Return the schedule with its subjects pruned into the run, and evaluated on `texts`; shows a bar."""
    threads, seed = environment.threads(), request.suite.seed
    with preparing() as report:
        return quality.prepare(plan or request.plan, texts, folder, seed=seed, threads=threads, report=report)


@contextmanager
def preparing() -> Generator[quality.Report]:
    """Yield report(what, done, total) that shows a bar for each `what`."""
    with console.progress() as bar:
        tasks: dict[str, Any] = {}

        def report(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bar.add_task(what, total=total)
            bar.update(tasks[what], completed=done, total=total)

        yield report
