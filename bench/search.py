"""Makes the trials that `frontier` asks for, each in a fresh child process, and writes what was found. Torch-free.

A trial ends by fitting, by running out of memory, or by something else: then it is made once more, and a second failure
ends the search of that subject, whose largest batch is then null with the reason.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import msgspec

from bench import children, environment, frontier, jobs, memory, outcomes, rows, runner, runtimes, store, worker
from bench.frontier import Answer, Ask, Trial
from bench.jobs import DECODER
from bench.measurement import Frontier
from bench.outcomes import Verdict
from bench.runner import Settings
from bench.schedule import Group, Planned, Schedule, impossible

TRIES = 2


class Tried(msgspec.Struct, frozen=True):
    """What one child came to. `fits`: None where it ended by something else than memory; seconds of loading and of the
    trial itself."""

    batch: int
    fits: bool | None
    reason: str = ""
    peak_bytes: int | None = None
    start_s: float = 0.0
    trial_s: float = 0.0


Watch = Callable[[Group, tuple[Trial, ...], Ask], None]


def run(plan: Schedule, settings: Settings, folder: Path, watch: Watch) -> list[Frontier]:
    """Search the largest batch of every group that has no confirmed one in `folder` yet; return all of them.

    Raises InputError where the disk refuses a row, IncomparableError where the run was begun elsewhere.
    """
    file = store.file_of(folder)
    known = runner.known(file)
    environments = runner.environments(plan, settings)
    runner.check_environments(known, environments.values())
    done = {row.cell: row for row in known.frontiers if row.confirmed} if known else {}
    runner.serve(plan, settings)
    with store.Writer(file) as writer:
        for one in environments.values():
            writer.write(one)
        for group in plan.groups:
            if group.key not in done:
                found = search(group, settings, watch)
                done[group.key] = msgspec.structs.replace(found, environment=environments[found.simulated].id)
                writer.write(done[group.key])
    return [done[group.key] for group in plan.groups]


def search(group: Group, settings: Settings, watch: Watch) -> Frontier:
    """Return the frontier of one group; its `environment` is left to the caller."""
    key, shape, limit = group.key, group.subject.shape, _limit(group, settings)
    predicted = memory.largest_of(shape, key, limit)
    row = Frontier(
        cell=key,
        environment="",
        largest_batch=None,
        simulated=key.runtime in runtimes.SIMULATED,
        predicted=predicted,
        limit_bytes=limit,
        emulated=rows.emulated(key, settings.machine),
    )
    said = impossible(group)
    if said:
        return msgspec.structs.replace(row, largest_batch=0, confirmed=True, reason=said)
    trials: list[Trial] = []
    tried: list[Tried] = []
    while isinstance(asked := frontier.advise(trials, predicted), Ask):
        watch(group, tuple(trials), asked)
        for _ in range(TRIES):
            tried.append(attempt(group, asked, settings))
            if tried[-1].fits is not None:
                break
        last = tried[-1]
        if last.fits is None:
            reason = f"batch {asked.batch}, tried {TRIES} times: {last.reason}"
            return _spent(msgspec.structs.replace(row, reason=reason), trials, tried)
        trials.append(Trial(asked.batch, last.fits, asked.whole))
    peaks = [one.peak_bytes for one in tried if one.fits and one.batch == asked.largest and one.peak_bytes]
    return _answered(_spent(row, trials, tried), asked, max(peaks, default=None))


def _limit(group: Group, settings: Settings) -> int:
    """What the memory model is asked about: on a CPU without a budget, what is free now."""
    return runner.job(group, (), settings, "probe").limit_bytes or group.limit_bytes


def _spent(row: Frontier, trials: Iterable[Trial], tried: Iterable[Tried]) -> Frontier:
    heard = tuple(trials)
    return msgspec.structs.replace(
        row,
        fits=tuple(sorted({t.batch for t in heard if t.fits})),
        fails=tuple(sorted({t.batch for t in heard if not t.fits})),
        trials=len(tuple(tried)),
        trial_s=round(sum(one.trial_s for one in tried), 3),
        start_s=round(sum(one.start_s for one in tried), 3),
    )


def _answered(row: Frontier, answer: Answer, peak_bytes: int | None) -> Frontier:
    reason = None
    if answer.open_ended:
        reason = f"memory did not end at batch {answer.largest}, the largest that is tried"
    elif answer.beyond:
        several = ", ".join(map(str, answer.beyond))
        reason = f"not monotone: {several} fit although {answer.largest + 1} does not"
    return msgspec.structs.replace(
        row,
        largest_batch=answer.largest,
        non_monotone=bool(answer.beyond),
        unsteady=answer.unsteady,
        confirmed=True,
        peak_bytes=peak_bytes,
        reason=reason,
    )


def attempt(group: Group, asked: Ask, settings: Settings) -> Tried:
    """Make one trial in a child of its own."""
    cell = msgspec.structs.replace(group.key, batch=asked.batch)
    planned = Planned(cell, cell.id, 0, None, None, "ok")
    work = runner.job(group, [planned], settings, "certify" if asked.whole else "probe")
    start_s = 0.0
    with children.Child(worker.run, msgspec.json.encode(work), environment.child_variables(settings.threads)) as child:
        while True:
            try:
                message = DECODER.decode(child.receive(settings.timeout_s))
            except children.Silence:
                return Tried(asked.batch, None, f"took longer than {settings.timeout_s:g} s; raise --timeout")
            except children.Ended as end:
                said = outcomes.classify(end.words, end.exit_code, end.signal, limit_bytes=work.limit_bytes)
                return _failed(asked.batch, said, start_s, 0.0)
            if isinstance(message, jobs.Loaded):
                start_s = message.wall_s
            elif isinstance(message, jobs.Broke):
                return _failed(asked.batch, runner.verdict(message, work), start_s, max(message.wall_s - start_s, 0.0))
            elif isinstance(message, jobs.Finished):
                return Tried(asked.batch, True, "", message.memory.allocated, start_s, message.wall_s)


def _failed(batch: int, verdict: Verdict, start_s: float, trial_s: float) -> Tried:
    fits = False if verdict.outcome == "oom" else None
    return Tried(batch, fits, verdict.reason, start_s=start_s, trial_s=trial_s)
