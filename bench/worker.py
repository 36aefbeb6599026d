"""What a measuring child does: load one subject in one runtime, run its cells with batch ascending, report each.

Two kinds of pass. A memory pass runs on a CPU under a data limit, probes each cell and reports its peak. A timing pass
measures. The child decides nothing about outcomes beyond "this allocation failed"; the parent classifies the rest.
Imports torch only inside: the parent imports this module too.
"""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import msgspec

from bench import budget, outcomes, runtimes, timing
from bench.cells import Cell
from bench.measurement import Graphs, Memory, Samples
from bench.runtimes.protocol import Call, Options, OutOfMemory, Session
from bench.subjects import Subject
from shortllama.shape import ModelShape

if TYPE_CHECKING:
    from bench.runtimes.roofline import RooflineSession

# A model too small to matter: running it once starts threads and loads code, which belongs to no cell.
_TINY = ModelShape.uniform(
    vocabulary=64, hidden=32, head_dim=8, blocks=2, query_heads=4, kv_heads=2, neurons=64, tied=True
)

NO_ALLOCATOR = "a CPU has no caching allocator"
NOT_READ = "not read in a sweep"
SEPARATE = "the memory pass sees one peak"


class Job(msgspec.Struct, frozen=True):
    """The cells of one group (or what is left of it) for one child. `timing` None means a memory pass.

    `limit_bytes`: what the process may allocate from now on (memory pass); budgets of other devices are in `options`.
    `script`: faults of a simulated device, JSON.
    """

    subject: Subject
    runtime: str
    options: Options
    cells: tuple[Cell, ...]
    timing: str | None = None
    cell_seconds: float = 0.0
    limit_bytes: int | None = None
    script: str | None = None


class Loaded(msgspec.Struct, frozen=True, tag=True):
    """The subject is there; seconds it took."""

    wall_s: float


class Began(msgspec.Struct, frozen=True, tag=True):
    """Work on the job's cell of this index has begun."""

    index: int


class Finished(msgspec.Struct, frozen=True, tag=True):
    """The cell was measured (timing pass), or fits (memory pass: no samples)."""

    index: int
    wall_s: float
    samples: Samples = Samples()
    warm_up: int = 0
    stop: str | None = None
    tokens: int | None = None
    memory: Memory = Memory()
    graphs: Graphs | None = None
    operations: dict[str, int] | None = None


class Broke(msgspec.Struct, frozen=True, tag=True):
    """The cell, or loading (index -1), ended in an exception; `oom` where an allocation failed. The child ends."""

    index: int
    text: str
    oom: bool
    wall_s: float


Message = Loaded | Began | Finished | Broke
DECODER: msgspec.json.Decoder[Message] = msgspec.json.Decoder(Message)
Send = Callable[[Message], None]


def run(job: bytes, send_bytes: Callable[[bytes], None]) -> None:
    """Entry of a child: decode the job, run its pass, send messages."""

    def send(message: Message) -> None:
        send_bytes(msgspec.json.encode(message))

    work = msgspec.json.decode(job, type=Job)
    place = [-1]
    start = time.perf_counter()
    try:
        _run(work, send, place)
    except OutOfMemory as error:
        send(Broke(place[0], str(error), True, time.perf_counter() - start))
    except Exception as error:  # a crash of one cell is a result; the parent decides what it means
        text = f"{type(error).__name__}: {error}"
        send(Broke(place[0], outcomes.one_line(text), False, time.perf_counter() - start))


def _run(job: Job, send: Send, place: list[int]) -> None:
    start = time.perf_counter()
    simulated = job.runtime in runtimes.SIMULATED
    if simulated:
        session = _open_simulated(job)
        measure = _simulate
    else:
        _set_threads(job.options)
        measure = _open_memory_pass(job) if job.timing is None else _open_timing_pass(job)
        session = runtimes.load(job.runtime).open_session(job.subject, job.options)
        gc.collect()
        gc.freeze()  # the model's objects are for ever: collections in timed regions need not visit them
    send(Loaded(time.perf_counter() - start))
    for index, cell in enumerate(job.cells):
        place[0] = index
        send(Began(index))
        start = time.perf_counter()
        session.prepare(cell.batch, cell.prompt, cell.output)
        result = msgspec.structs.replace(measure(job, session), graphs=session.graphs())
        if job.timing is not None:
            result = msgspec.structs.replace(result, operations=session.operations())
        send(msgspec.structs.replace(result, index=index, wall_s=time.perf_counter() - start))
    session.close()


def _set_threads(options: Options) -> None:
    import torch

    torch.set_num_threads(options.threads)


# -- passes: each returns what measures one prepared cell -------------------------------------------------------------


def _open_memory_pass(job: Job) -> Callable[[Job, Session], Finished]:
    """Set this process up for probing under a limit (see `budget`): everything but the subject is there before it."""
    from bench.runtimes import loading

    assert job.limit_bytes is not None
    budget.fix_malloc()
    tiny = runtimes.load(job.runtime).open_session(Subject("warm-up", _TINY, "warm-up"), job.options)
    tiny.prepare(1, 4, 3)
    tiny.call()
    tiny.probe()
    tiny.close()
    del tiny
    loading.warm_up(job.subject, job.options)
    budget.settle()
    baseline = budget.resident_bytes()
    budget.limit_data(job.limit_bytes)

    def probe(_: Job, session: Session) -> Finished:
        budget.settle()
        resets = budget.reset_peak()
        session.probe()
        reasons = {"reserved": NO_ALLOCATOR, "device_used": NOT_READ, "context": NOT_READ, "first_call": SEPARATE}
        if not resets:
            reasons["allocated"] = "the kernel refuses to reset the peak (/proc/self/clear_refs)"
        peak = max(budget.peak_bytes() - baseline, 0) if resets else None
        return Finished(0, 0.0, memory=Memory(allocated=peak, reasons=reasons))

    return probe


def _open_timing_pass(job: Job) -> Callable[[Job, Session], Finished]:
    """Set this process up for measuring: no limit and no malloc settings on a CPU; on CUDA, the budget's share."""
    cuda = job.options.device != "cpu"
    if cuda and job.options.budget_bytes is not None:
        import torch

        total = torch.cuda.get_device_properties(job.options.device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, job.options.budget_bytes / total), job.options.device)
    return _measure_on_cuda if cuda else _measure


def _measure(job: Job, session: Session) -> Finished:
    return _timed(job, session.call, session.clock)


def _timed(job: Job, call: Callable[[], Call], clock: Callable[[], float]) -> Finished:
    assert job.timing is not None
    done = timing.measure(call, clock, timing.rule(job.timing, job.cell_seconds))
    return Finished(0, 0.0, done.samples, done.warm_up, done.stop, done.tokens)


def _measure_on_cuda(job: Job, session: Session) -> Finished:
    """Measure, with the allocator's own peaks: of the very first call apart, where workspaces are made."""
    import torch

    device = job.options.device
    first: list[int] = []
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)

    def call() -> Call:
        done = session.call()
        if not first:
            first.append(torch.cuda.max_memory_allocated(device))
            torch.cuda.reset_peak_memory_stats(device)
        return done

    result = _timed(job, call, session.clock)
    memory = Memory(
        allocated=torch.cuda.max_memory_allocated(device),
        reserved=torch.cuda.max_memory_reserved(device),
        first_call=first[0],
        reasons={"device_used": NOT_READ, "context": NOT_READ},
    )
    return msgspec.structs.replace(result, memory=memory)


# -- simulation -------------------------------------------------------------------------------------------------------


def _open_simulated(job: Job) -> RooflineSession:
    from bench.runtimes import roofline

    if job.script is not None:
        os.environ[roofline.SCRIPT_VARIABLE] = job.script
    return roofline.open_session(job.subject, job.options)


def _simulate(job: Job, session: Any) -> Finished:
    result = _measure(job, session)
    absent: dict[str, str] = dict.fromkeys(("reserved", "device_used", "context", "first_call"), "simulated")
    return msgspec.structs.replace(result, memory=Memory(allocated=session.peak_bytes(), reasons=absent))
