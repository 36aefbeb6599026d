"""The verb `ab`: two revisions or two models, measured in turn until it is clear which is faster. Imports no torch.

What comes next is decided in `experiment`, what it means in `comparison`; the order of events is in `conduct`. Here the
options become two sides, the cells of a suite, and a folder that is begun or taken up again.
"""

from __future__ import annotations

import secrets
import signal
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import typer

from bench import conduct, environment, experiment, filters, run_folder, runtimes, schedule, sides, store
from bench.cells import Cell, Suite, read_suite
from bench.compare import publish
from bench.comparison import Comparison
from bench.environment import Machine
from bench.experiment import Design
from bench.measurement import Environment
from bench.sequential import FULL, Looks
from bench.sessions import Sessions, place
from bench.sides import Side
from bench.store import Results
from shortllama import console, files
from shortllama.errors import InputError, ShortllamaError

FILE = "ab.json"


class Document(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """ab.json: what an experiment was begun with, so that it goes on as the same or not at all.

    `sources`: digests of source trees measured as they are. Schema history: shortllama.ab/1: first.
    """

    design: Design
    suite: Suite
    cells: str | None
    sources: tuple[str, str]
    schema: Literal["shortllama.ab/1"] = "shortllama.ab/1"


def ab(
    base: Annotated[
        str,
        typer.Option(metavar="REF|DIR", help="Git revision, source tree, checkpoint, plan or subject to compare with."),
    ],
    head: Annotated[str, typer.Option(metavar="REF|DIR", help="The same kind of thing, to judge.")],
    suite: Annotated[
        str, typer.Option(metavar="NAME", help="TOML file or shipped suite; two models take the place of its subjects.")
    ] = "ab",
    cells: Annotated[
        str | None, typer.Option(metavar="EXPR", help='Only these cells: "batch<=8 and runtime==eager".')
    ] = None,
    pairs: Annotated[
        str, typer.Option(metavar="N[-MOST]", help="Pairs of sessions before the first verdict, and at most (12).")
    ] = str(FULL.first),
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda, cuda:1, or a device to simulate. Default: CUDA if there is one.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="RUN", help="Folder of the experiment. Default: runs/ab_<device>_<date>.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an experiment, or start it.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")] = False,
) -> int:
    """Measure two revisions or two models in turn and compare them: exit code 1 where head is slower.

    Sessions alternate (base head, head base, ...) in fresh processes. After 5 pairs, cells that are clear end; the
    others get more, up to 12. RUN/base and RUN/head are runs that compare and report read.
    """
    before, after = sides.understand(base, head, Path.cwd())
    asked = Asked(read_suite(suite), cells, _looks(pairs), device)
    folder = out or run_folder.default("ab", environment.machine(device).slug)
    found = measure(before, after, asked, folder, resume=resume)
    code = publish(found, as_json=as_json)
    console.say(f"wrote {folder}; judge it again by shortllama compare {folder / 'base'} {folder / 'head'}")
    return code


class Asked(msgspec.Struct, frozen=True):
    """What is to be measured on both sides, and how often."""

    suite: Suite
    cells: str | None = None
    looks: Looks = FULL
    device: str | None = None


def measure(base: Side, head: Side, asked: Asked, folder: Path, *, resume: bool = False) -> Comparison:
    """Run an experiment into `folder`; return its comparison. Raises what its sides, cells and sessions refuse."""
    machine, suite = environment.machine(asked.device), asked.suite
    by_subject = base.subject is not None
    design = Design(
        secrets.token_hex(8), base.what, head.what, asked.looks, by_subject=by_subject, notes=sides.notes(base, head)
    )
    subjects = {"base": base.subject, "head": head.subject} if by_subject else None
    suites = {side: _of_side(suite, subjects[side] if subjects else None) for side in experiment.SIDES}
    document = Document(design, suite, asked.cells, (base.digest, head.digest))
    new = not (folder / FILE).exists()
    design = _begin(folder, document, suites, resume=resume)
    try:
        with _ending_well(), sides.checked_out((base, head)) as roots:
            plan = _plan(suite, machine, folder, asked.cells, subjects)
            sessions = Sessions(suite, asked.device, plan.places)

            def session(side: str, wanted: Sequence[Cell]) -> Results:
                return sessions.run(roots[experiment.SIDES.index(side)], [plan.on(side, cell) for cell in wanted])

            with _watching(design.looks) as tell:
                return conduct.conduct(design, plan.cells, folder, _environments(suite, machine), session, tell)
    except ShortllamaError:
        if new and not any((folder / side / store.FILE_NAME).exists() for side in experiment.SIDES):
            files.remove_folder(folder)
        raise
    except KeyboardInterrupt:
        console.say(f"{folder}: keeps the pairs that were measured; go on with --resume")
        raise


@contextmanager
def _ending_well() -> Generator[None]:
    """Take a request to terminate for Ctrl-C, so that worktrees and sessions end with us."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _of_side(suite: Suite, subject: str | None) -> Suite:
    return msgspec.structs.replace(suite, subjects=(subject,)) if subject else suite


def _looks(text: str) -> Looks:
    first, dash, most = text.partition("-")
    if not first.isdigit() or (dash and not most.isdigit()):
        raise InputError(f"--pairs {text!r} is no number of pairs; write for example 5, or 5-8 for five to eight")
    looks = Looks(int(first), int(most) if dash else max(FULL.most, int(first)))
    if not 2 <= looks.first <= looks.most <= 99:
        raise InputError(f"--pairs {text!r}: give 2 pairs or more, at most 99, and no more at first than in all")
    return looks


# -- what is measured -------------------------------------------------------------------------------------------------


class Plan(msgspec.Struct, frozen=True):
    """The cells, named as on the base's side, and where their subjects are. `head`: the head's subject, None where
    the sides have the same."""

    cells: tuple[Cell, ...]
    places: dict[str, str]
    head: str | None

    def on(self, side: str, cell: Cell) -> Cell:
        """Return a cell as that side measures it."""
        return msgspec.structs.replace(cell, subject=self.head) if side == "head" and self.head else cell


def _plan(
    suite: Suite, machine: Machine, folder: Path, cells: str | None, subjects: dict[str, str | None] | None
) -> Plan:
    """The cells of an experiment; `subjects` by side where these differ. Prunes what must be pruned."""
    from bench.subjects import expand

    named = expand(suite.subjects) if subjects is None else tuple(filter(None, subjects.values()))
    places = {name: place(name, folder) for name in named}
    keep = filters.parse(cells) if cells else None
    first = named if subjects is None else named[:1]
    found: list[Cell] = []
    for name in first:
        one = msgspec.structs.replace(suite, subjects=(places[name],))
        planned = schedule.plan(one, machine.device).planned()
        found += [msgspec.structs.replace(each.cell, subject=name) for each in planned]
    found = [cell for cell in found if keep is None or keep(cell)]
    if not found:
        raise InputError(f"--cells {cells!r} leaves no cell of the suite; widen it")
    return Plan(tuple(found), places, None if subjects is None else subjects["head"])


def _environments(suite: Suite, machine: Machine) -> dict[bool, Environment]:
    """One environment for both sides, as the running code describes it: they share it by construction, and how an old
    revision would have described it does not matter."""
    from bench.runtimes import roofline

    kinds = {name in runtimes.SIMULATED for name in suite.runtimes}
    found: dict[bool, Environment] = {}
    if True in kinds:
        found[True] = environment.simulated(machine.device, roofline.script_from_environment())
    if False in kinds:
        found[False] = environment.measured(machine, environment.threads())
    return found


# -- the experiment's folder ------------------------------------------------------------------------------------------


def _begin(folder: Path, document: Document, suites: dict[str, Suite], *, resume: bool) -> Design:
    """Make the folder with a run for each side, or take it up again; return the design, with its id of then."""
    file = folder / FILE
    if not file.exists():
        if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
            raise InputError(f"{folder}: exists and holds no {FILE}, so it is no experiment; give another --out")
        for side in experiment.SIDES:
            try:
                (folder / side).mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise InputError(f"{folder}: cannot be written ({error.strerror}); give another --out") from error
            files.write_atomically(folder / side / run_folder.SUITE, run_folder.to_toml(suites[side]))
        files.write_atomically(file, files.encode_json(document))
        return document.design
    if not resume:
        raise InputError(f"{folder}: holds an experiment already; go on with it by --resume, or give another --out")
    before = files.decode_json(files.read_bytes(file), Document, str(file))
    now = msgspec.structs.replace(document, design=msgspec.structs.replace(document.design, id=before.design.id))
    for name, old, new in _differences(before, now):
        raise InputError(f"{folder}: was begun with {name} = {old}, now {new}; give another --out")
    return before.design


def _differences(before: Document, now: Document) -> Generator[tuple[str, Any, Any]]:
    for name in ("base", "head", "looks"):
        if getattr(before.design, name) != getattr(now.design, name):
            yield name, getattr(before.design, name), getattr(now.design, name)
    for name in ("suite", "cells", "sources"):
        if getattr(before, name) != getattr(now, name):
            yield name, getattr(before, name), getattr(now, name)


# -- showing ---------------------------------------------------------------------------------------------------------


@contextmanager
def _watching(looks: Looks) -> Generator[Callable[[str], None]]:
    """Yield what shows the session at hand, and how many of the most there may be."""
    with console.progress() as bar:
        task = bar.add_task("starting", total=2 * looks.most, completed=-1)
        yield lambda words: bar.update(task, description=words, advance=1)
