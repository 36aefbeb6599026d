"""A long campaign on a device that is only lent: slices of minutes, the most informative cells first, resumable.

    python -m bench.campaign paper-7b --dry-run           what each slice costs on this device
    python -m bench.campaign paper-7b --minutes 9         go on where the last call ended, for that long
    python -m bench.campaign paper-7b --device h200 --simulate    rehearse all of it on the simulator

A slice is a command that already exists (sweep or oom) with a filter over the suite's cells, so a campaign is an
ordinary run: its rows resume, compare and report like any other. `slices.json` in the run says what each was predicted
to take and took. When the minutes are over, the command at work is interrupted, keeps its finished cells, and goes on
next time.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated, Literal

import msgspec
import typer

from bench import environment, filters, run_folder, schedule
from bench.cells import read_suite
from shortllama import console, files
from shortllama.errors import InputError

GRACE_S = 60.0  # what a command gets to end after its interrupt
LEAST_S = 20.0  # a slice is not begun with less left
INTERRUPTED = 130


class Slice(msgspec.Struct, frozen=True):
    """One step of a campaign: a command and the cells it is for."""

    name: str
    verb: Literal["sweep", "oom"]
    cells: str


_FEW = "('depth-23' in subject or 'wanda-sp-27' in subject or 'depth-29' in subject or 'wanda-sp-29' in subject)"
_CORE = f"(not '/' in subject or ({_FEW} and not '~128' in subject))"
_MAIN = "runtime in ['eager', 'cudagraph']"
_ONE = "batch==1 and output==128 and budget=='none'"
# The most informative first: what a launch-bound and a graph-captured step cost, then where memory ends, then the rest.
SLICES = (
    Slice("one sequence", "sweep", f"{_ONE} and {_MAIN} and not '~128' in subject"),
    Slice("batches", "sweep", f"batch in [16, 64] and output==128 and budget=='none' and {_MAIN} and {_CORE}"),
    Slice("frontier", "oom", f"output==512 and runtime=='cudagraph' and budget in ['none', '24GiB'] and {_CORE}"),
    Slice("launch share", "sweep", f"{_ONE} and runtime in ['static', 'paper']"),
    Slice("frontier eager", "oom", f"output==512 and runtime=='eager' and budget in ['none', '24GiB'] and {_CORE}"),
    Slice("aligned to 128", "sweep", f"{_ONE} and {_MAIN}"),
    Slice("all batches", "sweep", f"output==128 and budget=='none' and {_MAIN} and not '~' in subject"),
    Slice("long outputs", "sweep", f"output==512 and budget=='none' and {_MAIN} and not '~' in subject"),
    Slice("every frontier", "oom", f"output==512 and {_MAIN} and not '~' in subject"),
    Slice("paper protocol", "sweep", "runtime=='paper' and budget=='none' and not '~' in subject"),
)  # fmt: skip


class Spent(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a slice was predicted to take and took so far, seconds; `calls` counts the commands it took."""

    predicted_s: float | None = None
    spent_s: float = 0.0
    calls: int = 0
    done: bool = False


class Record(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """slices.json. Schema history: shortllama.slices/1: first."""

    slices: dict[str, Spent]
    schema: Literal["shortllama.slices/1"] = "shortllama.slices/1"


def campaign(
    suite: Annotated[str, typer.Argument(metavar="SUITE", help="paper-7b or paper-13b.", show_default=False)],
    out: Annotated[Path | None, typer.Option(metavar="RUN", help="Folder of the run.", show_default=False)] = None,
    device: Annotated[str | None, typer.Option(help="As for shortllama sweep.")] = None,
    minutes: Annotated[float, typer.Option(min=0.5, help="End after this long.")] = 9.0,
    simulate: Annotated[bool, typer.Option("--simulate", help="Rehearse with the roofline runtime.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the slices with predictions.")] = False,
) -> int:
    """Run the slices of a campaign, as far as the minutes go; the next call goes on. Exit code 1 if a cell failed."""
    machine = environment.machine(device)
    if machine.kind != "cuda" and not (simulate or dry_run):
        raise InputError(
            f"a campaign needs a CUDA device, and this is {machine.name}; rehearse with --simulate --device h200"
        )
    predicted = {one.name: predict(suite, one, device, simulate) for one in SLICES}
    if dry_run:
        _show(predicted)
        return 0
    folder = out or run_folder.default(suite, machine.slug)
    ends = time.monotonic() + 60 * minutes
    failed = 0
    for one in SLICES:
        before = read(folder).slices.get(one.name, Spent())
        if before.done:
            continue
        left = ends - time.monotonic()
        if left < LEAST_S:
            console.say(f"{folder}: the minutes are over before {one.name!r}; go on with the same command")
            return 0
        console.say(f"{one.name}: {one.verb} {one.cells}")
        start = time.monotonic()
        code = run(command(suite, one, folder, device, simulate), left)
        spent = Spent(predicted[one.name], before.spent_s + time.monotonic() - start, before.calls + 1, code in (0, 1))
        write(folder, one.name, spent)
        if code == INTERRUPTED:
            console.say(f"{folder}: the minutes are over within {one.name!r}; go on with the same command")
            return 0
        if code not in (0, 1):
            return code
        failed |= code
    console.say(f"{folder}: every slice is done")
    return failed


def predict(suite: str, one: Slice, device: str | None, simulate: bool) -> float | None:
    """Return the predicted seconds of a slice's measurements; None where the device's rates are not known."""
    chosen = read_suite(suite)
    if simulate:
        chosen = msgspec.structs.replace(chosen, runtimes=("roofline",))
    machine = environment.machine(device)
    batch = (1,) if one.verb == "oom" else None
    gridded = chosen if batch is None else msgspec.structs.replace(chosen, batch=batch)
    plan = schedule.plan(gridded, machine.device, keep=filters.parse(_filter(one, simulate)))
    known = [planned.call_s for planned in plan.planned()]
    if any(call is None for call in known):
        return None
    # A search makes some ten trials of a prefill and a step each, and one whole call.
    return sum(call or 0.0 for call in known) if one.verb == "oom" else plan.seconds


def _filter(one: Slice, simulate: bool) -> str:
    """The slice's cells; the simulator plays every runtime at once, as `roofline`."""
    if not simulate:
        return one.cells
    kept = [part for part in one.cells.split(" and ") if not part.startswith("runtime")]
    return " and ".join(kept)


def command(suite: str, one: Slice, folder: Path, device: str | None, simulate: bool) -> list[str]:
    """Return the command line of a slice."""
    more = ["--device", device] if device else []
    more += ["--runtime", "roofline"] if simulate else []
    line = [sys.executable, "-m", "bench", one.verb, suite, "--cells", _filter(one, simulate), "--out", str(folder)]
    return [*line, "--resume", *more]


def run(line: list[str], seconds: float) -> int:
    """Run a command for at most `seconds`, then interrupt it; return its exit code, 130 where it was interrupted."""
    with subprocess.Popen(line, env=os.environ, start_new_session=True) as process:
        try:
            return process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGINT)
        except KeyboardInterrupt:
            process.send_signal(signal.SIGINT)
            process.wait(GRACE_S)
            raise
        try:
            process.wait(GRACE_S)
        except subprocess.TimeoutExpired:
            process.kill()
        return INTERRUPTED


def read(folder: Path) -> Record:
    """Return what the slices of a run took so far."""
    path = folder / "slices.json"
    return files.decode_json(files.read_bytes(path), Record, str(path)) if path.exists() else Record({})


def write(folder: Path, name: str, spent: Spent) -> None:
    """Record what a slice took."""
    spent = msgspec.structs.replace(spent, spent_s=round(spent.spent_s, 1))
    record = Record({**read(folder).slices, name: spent})
    if folder.is_dir():
        files.write_atomically(folder / "slices.json", msgspec.json.format(msgspec.json.encode(record), indent=1))


def _show(predicted: dict[str, float | None]) -> None:
    total = 0.0
    width = max(map(len, predicted))
    for name, seconds in predicted.items():
        total += seconds or 0.0
        text = "not known" if seconds is None else f"{seconds:8.0f} s {total:10.0f} s in all"
        sys.stdout.write(f"{name:<{width}}  {text}\n")


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(campaign)
    sys.exit(console.run(app))
