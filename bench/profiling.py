"""`sweep --profile CELL`: a torch trace of one cell, and in words where its time goes. Writes no rows."""

from __future__ import annotations

from pathlib import Path

import msgspec

from bench import children, environment, filters, outcomes, runner, runtimes, worker
from bench.cells import Cell
from bench.children import Child
from bench.jobs import DECODER, Broke, Finished, Profile
from bench.report import quantities
from bench.runner import Settings
from bench.schedule import Group, Planned, Schedule
from shortllama.errors import InputError

FOLDER = "profiles"


def choose(plan: Schedule, text: str) -> tuple[Group, Planned]:
    """Return the one cell that `text` means: a cell's id, or an expression that leaves one.

    Raises InputError where it leaves none or several, and for a simulated cell, which runs nothing.
    """
    ids = {one.cell_id for one in plan.planned()}
    keep = (lambda cell: cell.id == text) if text in ids else _parse(text)
    found = [(group, one) for group in plan.groups for one in group.cells if keep(one.cell)]
    if len(found) != 1:
        some = "; ".join(one.cell.label for _, one in found[:3])
        left = f"{len(found)} cells: {some}{', ...' if len(found) > 3 else ''}" if found else "no cell"
        raise InputError(f"--profile {text!r} leaves {left}; give what only one cell has, such as its cell_id")
    if found[0][1].cell.runtime in runtimes.SIMULATED:
        raise InputError(f"--profile {text!r}: {found[0][1].cell.label} is simulated; there is nothing to profile")
    return found[0]


def _parse(text: str) -> filters.Test:
    try:
        return filters.parse(text)
    except InputError as error:
        raise InputError(str(error).replace("--cells", "--profile", 1)) from None


def profile(group: Group, planned: Planned, settings: Settings, run: Path) -> Profile:
    """Profile a cell in a child of its own; the trace goes into `run`/profiles. Raises InputError where that fails."""
    folder = run / FOLDER
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{folder}: cannot be written ({error.strerror}); give another --out") from error
    work = msgspec.structs.replace(runner.job(group, [planned], settings, "profile"), folder=str(folder))
    variables = environment.child_variables(settings.threads)
    children.serve(children.TORCH_MODULES, variables)
    with Child(worker.run, msgspec.json.encode(work), variables) as child:
        while True:
            try:
                message = DECODER.decode(child.receive(settings.timeout_s))
            except children.Silence:
                raise _failed(planned.cell, f"took longer than {settings.timeout_s:g} s; raise --timeout") from None
            except children.Ended as end:
                raise _failed(planned.cell, end.reason) from None
            if isinstance(message, Broke):
                raise _failed(planned.cell, outcomes.one_line(message.text))
            if isinstance(message, Finished):
                assert message.profile is not None
                return message.profile


def _failed(cell: Cell, reason: str) -> InputError:
    return InputError(f"profile of {cell.label}: {reason}")


def text(found: Profile, planned: Planned) -> str:
    """Return what a profile says, for people."""
    share = ""
    if found.kernel_s is not None:
        share = f", kernels {quantities.seconds(found.kernel_s)} ({found.kernel_s / found.wall_s:.0%} of it)"
    width = max(len(name) for name, *_ in found.longest)
    lines = [f"{planned.cell.label}: prefill and last step {quantities.seconds(found.wall_s)}{share}, profiled"]
    lines += [f"  {name:<{width}}  {count:>6} x  {quantities.seconds(took):>9}" for name, count, took in found.longest]
    lines.append(f"wrote {found.path}; open it in ui.perfetto.dev or chrome://tracing")
    return "\n".join(lines)
