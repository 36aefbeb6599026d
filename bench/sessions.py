"""One session of an experiment: a sweep of some cells in a process of its own, by some code, as rows.

The sweep is asked for on the command line, so that any revision which has one can be measured; its rows come back as
today's. Subjects that must be pruned first are pruned once, before the first session, and every session loads them.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from pathlib import Path

import msgspec

from bench import quality, run_folder, store, subjects
from bench.cells import Cell, Suite
from bench.measurement import Measurement
from bench.sides import HERE
from bench.store import Results
from shortllama import files
from shortllama.errors import InputError
from shortllama.plans import read_plan

SUITE = "session.toml"
_PATIENCE_S = 10.0  # for an interrupted sweep to end by itself


class Sessions(msgspec.Struct, frozen=True):
    """How to run a session. `places`: the name of a subject in a session's suite, by its name in the experiment."""

    suite: Suite
    device: str | None
    places: dict[str, str]

    def run(self, root: Path, cells: Sequence[Cell]) -> Results:
        """Return the rows of one sweep of `cells` by the code in `root`.

        Raises InputError where the sweep refuses, KeyboardInterrupt where it was interrupted.
        """
        names = tuple(dict.fromkeys(cell.subject for cell in cells))
        wanted = [msgspec.structs.replace(cell, subject=self.places[cell.subject]) for cell in cells]
        suite = msgspec.structs.replace(self.suite, subjects=tuple(self.places[name] for name in names), perplexity=())
        with tempfile.TemporaryDirectory(prefix="shortllama-session-") as folder:
            file, run = Path(folder) / SUITE, Path(folder) / "run"
            files.write_atomically(file, run_folder.to_toml(suite))
            device = ["--device", self.device] if self.device else []
            launch(root, ["sweep", str(file), "--out", str(run), "--cells", expression(wanted), *device])
            found = _renamed(store.read(run), {self.places[name]: name for name in names})
        if sorted(row.cell for row in found.measurements) != sorted(cells):
            raise InputError(
                f"a sweep by {root.name} measured other cells than it was asked for; is its suite format too old?"
            )
        return found


def launch(root: Path, arguments: Sequence[str]) -> None:
    """Run `shortllama ARGUMENTS` by the code in `root` until it ends; a failed cell is a result, and no failure.

    Raises InputError with the command's own last line where it refuses.
    """
    path = os.pathsep.join(filter(None, (str(root), os.environ.get("PYTHONPATH"))))
    # -P: not what stands in the current folder, which may have a package of the same name.
    command = [sys.executable, "-P", "-m", "bench", *arguments]
    process = subprocess.Popen(
        command, env={**os.environ, "PYTHONPATH": path}, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    try:
        _, words = process.communicate()
    except BaseException:
        _stop(process)
        raise
    if process.returncode not in (0, 1):
        last = words.strip().rpartition("\n")[2].removeprefix("error: ")
        raise InputError(f"{arguments[0]} ended with exit code {process.returncode}: {last or 'no message'}")


def _stop(process: subprocess.Popen[str]) -> None:
    """End a session and what it started: by asking, as Ctrl-C does, then by force."""
    for number in (signal.SIGINT, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
            os.killpg(process.pid, number)
            process.wait(_PATIENCE_S)
            return


def expression(cells: Iterable[Cell]) -> str:
    """Return the text for `sweep --cells` that chooses exactly these cells."""
    parts: list[str] = []
    for group, members in groupby(sorted(cells), key=lambda cell: cell.group):
        fields = msgspec.structs.asdict(group)
        fields.pop("batch")
        tests = [f"{name} == {value!r}" for name, value in fields.items()]
        parts.append(" and ".join((*tests, f"batch in {[cell.batch for cell in members]!r}")))
    return " or ".join(f"({part})" for part in parts)


def _renamed(found: Results, names: Mapping[str, str]) -> Results:
    """The rows under the names of the experiment."""
    cells = {row.cell_id: _named(row.cell, names) for row in found.measurements}
    rows = [_rename(row, cells) for row in found.measurements]
    ends = [msgspec.structs.replace(row, cell=_named(row.cell, names)) for row in found.frontiers]
    return Results(found.path, found.environments, tuple(rows), tuple(ends))


def _rename(row: Measurement, cells: Mapping[str, Cell]) -> Measurement:
    cell = cells[row.cell_id]
    witness = cells[row.witness].id if row.witness and row.witness in cells else row.witness
    return msgspec.structs.replace(row, cell=cell, cell_id=cell.id, witness=witness)


def _named(cell: Cell, names: Mapping[str, str]) -> Cell:
    return msgspec.structs.replace(cell, subject=names.get(cell.subject, cell.subject))


# -- subjects ---------------------------------------------------------------------------------------------------------


def place(name: str, run: Path) -> str:
    """Return what a session's suite calls the subject `name`, pruning it into `run` where that must come first.

    A name is a plan's file or what a suite may name. Raises InputError for what cannot be pruned.
    """
    if Path(name).is_file():
        plan = read_plan(Path(name))
        return _pruned(run / quality.SUBJECTS / f"plan-{plan.digest()}", [plan.base.model, "--plan", name])
    subject = subjects.resolve(name)
    if subject.prune is None:
        return name
    base, method, ratio = subject.prune
    return _pruned(quality.folder_of(run, subject), [base, "--method", method, "--ratio", str(ratio)])


def _pruned(folder: Path, arguments: Sequence[str]) -> str:
    if not folder.is_dir():
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"{folder.parent}: cannot be written ({error.strerror}); give another --out") from error
        launch(HERE, ["prune", *arguments, "--out", str(folder)])
    return str(folder)
