"""Runs a schedule: one child process a group and pass, a row on disk after every cell, nothing lost and nothing twice.

On a CPU a group is a memory pass (every cell probed under the budget, batch ascending), then a timing pass over the
cells that fit, without the limit. On CUDA and in simulation one pass does both. After the first out-of-memory cell,
every cell that needs no less is implied. Only this process writes. What a failure means is decided in `outcomes`, what
comes next in `schedule`; here is only the order of events. A cell that heat slowed down is measured once more.
"""

from __future__ import annotations

import secrets
import time
from collections import Counter
from collections.abc import Generator, Iterable, Iterator
from contextlib import closing
from pathlib import Path

import msgspec

from bench import budget, children, environment, jobs, outcomes, rows, runtimes, schedule, store, worker
from bench.cells import Cell, Suite, budget_bytes
from bench.children import Child
from bench.environment import Machine
from bench.jobs import Job, Purpose
from bench.measurement import Environment, Measurement
from bench.outcomes import Verdict
from bench.rows import Heard
from bench.runtimes.protocol import Options
from bench.schedule import Group, Planned, Schedule
from bench.telemetry import loop, throttling
from bench.telemetry.watch import Watch
from shortllama import files
from shortllama.errors import IncomparableError

# Outcomes that make a sweep end with exit code 1.
BROKEN = ("failed", "timed-out")
# A cell measured for S seconds may take S of warm-up, 3 S of long calls, and loading: thirty times is far beyond.
TIMEOUT_FACTOR, SHORTEST_TIMEOUT_S = 30.0, 120.0


class Settings(msgspec.Struct, frozen=True):
    """How to run a schedule; `timeout_s` holds for loading a subject and for each cell."""

    suite: Suite
    machine: Machine
    threads: int
    timeout_s: float
    script: str | None = None


class Watcher:
    """Told what happens, for a progress display; this one shows nothing."""

    def began(self, cell: Cell) -> None:
        """A cell is being worked on."""

    def finished(self, row: Measurement) -> None:
        """A cell has its row."""


def timeout_s(cell_seconds: float) -> float:
    """Return the default time-out of a cell, seconds."""
    return max(SHORTEST_TIMEOUT_S, TIMEOUT_FACTOR * cell_seconds)


def run(plan: Schedule, settings: Settings, folder: Path, watcher: Watcher) -> Counter[str]:
    """Run what is missing of `plan` into `folder`; return how often each outcome stands in the finished run.

    Raises InputError where the disk refuses a row, IncomparableError where the rows already there come from a machine
    or software that this is not.
    """
    file = store.file_of(folder)
    before = known(file)
    wanted = {one.cell_id for one in plan.planned()}
    done = {row.cell_id: row for row in before.measurements} if before else {}
    found = environments(plan, settings)
    check_environments(before, found.values())
    frontiers = {row.cell: row for row in before.frontiers} if before else {}
    serve(plan, settings)
    with store.Writer(file) as writer, _watch(plan, settings, done) as watch:
        sweep = _Sweep(settings, writer, found, done, watcher, watch)
        for cell_id in wanted & done.keys():
            watcher.finished(done[cell_id])
        for group in plan.groups:
            sweep.group(group)
            known_end = frontiers.get(group.key)
            end = rows.frontier(group, sweep.of_group(group), sweep.environment(group))
            # A searched end stands; one read off the grid is told anew where a later call added batches.
            if known_end is None or (not known_end.confirmed and known_end != end):
                writer.write(end)
    return Counter(row.outcome for cell_id, row in done.items() if cell_id in wanted)


def _watch(plan: Schedule, settings: Settings, done: dict[str, Measurement]) -> Watch:
    """What reads telemetry, where anything is left to be measured."""
    groups = [group for group in plan.groups if group.key.runtime not in runtimes.SIMULATED]
    if all(one.cell_id in done for group in groups for one in group.cells):
        return Watch()
    machine = settings.machine
    return Watch(machine.index if machine.kind == "cuda" else None, sampled=settings.suite.telemetry)


def known(file: Path) -> store.Results | None:
    """Return the rows of a run, a torn last line cut off; None for one that was killed before its first, or is new."""
    if not file.exists():
        return None
    store.Writer(file).close()  # mends a torn last line
    data = files.read_bytes(file)
    return store.read(file) if b'"kind":"measurement"' in data or b'"kind":"frontier"' in data else None


def environments(plan: Schedule, settings: Settings) -> dict[bool, Environment]:
    """Return the environments of the plan's rows, by whether they are simulated."""
    from bench.runtimes import roofline

    found: dict[bool, Environment] = {}
    for simulated in {group.key.runtime in runtimes.SIMULATED for group in plan.groups}:
        if simulated:
            script = msgspec.json.decode(settings.script or "{}", type=roofline.Script)
            found[True] = environment.simulated(settings.machine.device, script)
        else:
            found[False] = environment.measured(settings.machine, settings.threads)
    return found


def check_environments(known: store.Results | None, now: Iterable[Environment]) -> None:
    """Raise IncomparableError where a run's rows come from another machine or software than now.

    One run has one machine: rows of two could be told apart, but a table of both would mislead.
    """
    before = {bool(one.fingerprint.get("simulated")): one for one in known.environments.values()} if known else {}
    for one in now:
        old = before.get(bool(one.fingerprint["simulated"]))
        if known and old is not None and old.id != one.id:
            raise IncomparableError(
                f"{known.path}: was measured elsewhere ({environment.differences(old, one)}); give another --out"
            )


def serve(plan: Schedule, settings: Settings) -> None:
    """Start what children come from, with the modules that the plan's runtimes need."""
    measured = any(group.key.runtime not in runtimes.SIMULATED for group in plan.groups)
    modules = children.TORCH_MODULES if measured else children.TORCH_FREE_MODULES
    children.serve(modules, environment.child_variables(settings.threads))


def job(group: Group, cells: Iterable[Planned], settings: Settings, purpose: Purpose) -> Job:
    """Return what a child is told to do with cells of a group."""
    suite, machine, key = settings.suite, settings.machine, group.key
    wanted, free = budget_bytes(key.budget), budget.available_bytes()
    simulated = key.runtime in runtimes.SIMULATED
    limited = purpose in ("probe", "certify") and machine.kind == "cpu" and not simulated
    options = Options(
        dtype=key.dtype,
        attention=key.attention,
        device=machine.device.short if simulated else machine.place,
        seed=suite.seed,
        threads=settings.threads,
        budget_bytes=wanted,
    )
    return Job(
        subject=group.subject,
        runtime=key.runtime,
        options=options,
        cells=tuple(one.cell for one in cells),
        purpose=purpose,
        timing=suite.timing,
        cell_seconds=suite.cell_seconds,
        limit_bytes=min(wanted or free, free) if limited else None,
        script=settings.script if simulated else None,
        window_s=loop.SECONDS[machine.kind] if suite.telemetry and purpose == "measure" and not simulated else 0.0,
    )


class _Sweep:
    """The state of a running sweep: rows so far, witnesses of implied cells, the writer."""

    def __init__(
        self,
        settings: Settings,
        writer: store.Writer,
        environments: dict[bool, Environment],
        done: dict[str, Measurement],
        watcher: Watcher,
        watch: Watch,
    ) -> None:
        self.rows = done
        self._groups: dict[Cell, list[Measurement]] = {}
        for row in done.values():
            self._groups.setdefault(row.cell.group, []).append(row)
        self._settings = settings
        self._writer = writer
        self._environments = environments
        self._watcher = watcher
        self._watch = watch
        self._witnesses = schedule.Witnesses(done.values())
        for one in environments.values():
            writer.write(one)

    def environment(self, group: Group) -> str:
        """The id of the environment that a group's rows refer to."""
        return self._environments[group.key.runtime in runtimes.SIMULATED].id

    def of_group(self, group: Group) -> list[Measurement]:
        """The rows of a group so far, those of earlier calls among them; batch ascending."""
        return sorted(self._groups.get(group.key, []), key=lambda row: row.cell.batch)

    def group(self, group: Group) -> None:
        """Run the cells of a group that have no row yet."""
        self._imply(group)
        self._rule_out(group)
        peaks: dict[str, Heard] = {}
        if self._settings.machine.kind == "cpu" and group.key.runtime not in runtimes.SIMULATED:
            with closing(self._pass(group, self._left(group), memory=True)) as heards:
                for heard in heards:
                    if heard.verdict:
                        self._finish(group, heard)
                    else:
                        peaks[heard.planned.cell_id] = heard
            self._imply(group)
        with closing(self._steady(group)) as heards:
            for heard in heards:
                self._finish(group, heard, peaks.get(heard.planned.cell_id))
        self._imply(group)
        assert not self._left(group), "every cell of a group ends with a row"

    def _left(self, group: Group) -> list[Planned]:
        return [one for one in group.cells if one.cell_id not in self.rows]

    def _rule_out(self, group: Group) -> None:
        """Write the row of the first cell of a group whose weights alone exceed its memory: no child need try."""
        said = schedule.impossible(group)
        for planned in self._left(group)[:1] if said else ():
            self._write(rows.without_result(group, planned, Verdict("oom", said or ""), self._context(group)))
        self._imply(group)

    def _imply(self, group: Group) -> None:
        """Write the rows of cells that an out-of-memory cell implies."""
        for planned in self._left(group):
            witness = self._witnesses.of(planned.cell)
            if witness is not None:
                reason = f"needs no less memory than {witness.label}, which ran out of it"
                row = rows.without_result(group, planned, Verdict("oom-implied", reason), self._context(group))
                self._write(msgspec.structs.replace(row, witness=witness.id))

    def _steady(self, group: Group) -> Generator[Heard]:
        """Measure the cells that are left; those that heat or hardware slowed down once more, after the others."""
        hot: dict[str, Heard] = {}
        with closing(self._pass(group, self._left(group), memory=False)) as heards:
            for heard in heards:
                if throttling.spoiled(heard.telemetry):
                    hot[heard.planned.cell_id] = heard
                else:
                    yield heard
        with closing(self._pass(group, [one.planned for one in hot.values()], memory=False)) as heards:
            for heard in heards:
                if heard.result and not throttling.spoiled(heard.telemetry):
                    del hot[heard.planned.cell_id]
                    yield heard
        for heard in hot.values():
            why = throttling.spoiled(heard.telemetry)
            reason = f"the device lowered its clocks ({why}), and again when the cell was measured once more"
            yield msgspec.structs.replace(heard, verdict=Verdict("unstable", reason))

    def _pass(self, group: Group, cells: list[Planned], *, memory: bool) -> Generator[Heard]:
        """Run cells in as many children as it takes; yield what became of each, up to the first out of memory."""
        left = list(cells)
        while left:
            with closing(self._child(group, list(left), memory=memory)) as heards:
                for heard in heards:
                    yield heard
                    left.remove(heard.planned)
                    if heard.verdict and heard.verdict.outcome == "oom":
                        return
                    if heard.verdict and heard.verdict.outcome == "timed-out":
                        yield from _skipped(left, f"larger than {heard.planned.cell.label}, which timed out")
                        return

    def _child(self, group: Group, cells: list[Planned], *, memory: bool) -> Generator[Heard]:
        """Run cells in one child; yield what became of each, until the child is done or gone."""
        work = job(group, cells, self._settings, "probe" if memory else "measure")
        session = secrets.token_hex(4)
        variables = environment.child_variables(self._settings.threads)
        index, start = -1, time.perf_counter()
        self._watcher.began(cells[0].cell)
        with Child(worker.run, msgspec.json.encode(work), variables) as child:
            while index < len(cells):
                message = self._hear(child, work, index)
                if isinstance(message, jobs.Loaded):
                    self._watch.loaded(child.pid, message.uuid)
                elif isinstance(message, jobs.Began):
                    index, start = message.index, time.perf_counter()
                    self._watcher.began(cells[index].cell)
                    self._watch.began()
                elif isinstance(message, jobs.Finished):
                    heard = Heard(cells[index], session, message, None, message.wall_s, self._watch.finished())
                    goes_on = index + 1 < len(cells)
                    if work.window_s:
                        heard, alive = self._sampled(child, work, index, heard)
                        goes_on = goes_on and alive
                    yield heard
                    if not goes_on:
                        return
                else:
                    assert isinstance(message, jobs.Broke | Verdict)
                    found = verdict(message, work)
                    yield Heard(cells[max(index, 0)], session, verdict=found, wall_s=time.perf_counter() - start)
                    if index < 0 and found.outcome == "failed":
                        yield from _skipped(cells[1:], f"the subject could not be loaded: {found.reason}")
                    return

    def _hear(self, child: Child, work: Job, index: int) -> jobs.Message | Verdict:
        """The child's next message, or what its silence or its end means."""
        try:
            return jobs.DECODER.decode(child.receive(self._settings.timeout_s))
        except children.Silence:
            return self._gave_up(index)
        except children.Ended as end:
            return outcomes.classify(end.words, end.exit_code, end.signal, limit_bytes=work.limit_bytes)

    def _sampled(self, child: Child, work: Job, index: int, timed: Heard) -> tuple[Heard, bool]:
        """Follow a timed cell while it is called for the sampler; return it with what that saw, and whether the child
        lives. What was timed stands, whatever becomes of the child."""
        start = time.perf_counter()
        while True:
            message = self._hear(child, work, index)
            if isinstance(message, jobs.Looping):
                self._watch.looping()
                continue
            if isinstance(message, jobs.Looped):
                seen = self._watch.looped(message.loop, timed.telemetry)
            else:
                assert isinstance(message, jobs.Broke | Verdict)
                seen = self._watch.broke(verdict(message, work).reason, timed.telemetry)
            wall_s = (timed.wall_s or 0.0) + time.perf_counter() - start
            return msgspec.structs.replace(timed, telemetry=seen, wall_s=wall_s), isinstance(message, jobs.Looped)

    def _gave_up(self, index: int) -> Verdict:
        what = "loading the subject" if index < 0 else "the cell"
        return Verdict("timed-out", f"{what} took longer than {self._settings.timeout_s:g} s; raise --timeout")

    def _finish(self, group: Group, heard: Heard, probed: Heard | None = None) -> None:
        """Write the row of a cell from what its passes gave."""
        self._write(rows.of(group, heard, probed, self._context(group)))

    def _context(self, group: Group) -> rows.Context:
        return rows.Context(self._settings.machine, self._settings.suite.timing, self.environment(group))

    def _write(self, row: Measurement) -> None:
        self._writer.write(row)
        self.rows[row.cell_id] = row
        self._groups.setdefault(row.cell.group, []).append(row)
        if row.outcome == "oom":
            self._witnesses.add(row.cell)
        self._watcher.finished(row)


def verdict(message: jobs.Broke | Verdict, job: Job) -> Verdict:
    """Return what a message that ends a child means for the cell it was at."""
    found = message
    if isinstance(message, jobs.Broke):
        found = outcomes.classify(message.text, None, None, limit_bytes=job.limit_bytes)
        found = Verdict("oom", message.text) if message.oom else found
    assert isinstance(found, Verdict)
    wanted, limit = job.options.budget_bytes, job.limit_bytes
    if found.outcome == "oom" and wanted and limit and limit < wanted:
        less = f"this machine had only {limit >> 20} MiB available for the budget of {wanted >> 20} MiB"
        return Verdict("oom", outcomes.one_line(f"{less}: {found.reason}"))
    return found


def _skipped(cells: Iterable[Planned], reason: str) -> Iterator[Heard]:
    for one in cells:
        yield Heard(one, "", verdict=Verdict("skipped", outcomes.one_line(reason)))
