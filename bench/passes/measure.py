"""Measures the times of each cell; on CUDA the allocator's peaks too, which cost nothing there."""

from __future__ import annotations

from collections.abc import Callable

import msgspec
import torch

from bench import timing
from bench.jobs import Finished, Job, Measure
from bench.measurement import Memory
from bench.runtimes.protocol import Call, OutOfMemory, Session

NOT_READ = "not read in a sweep"


def open_pass(job: Job) -> Measure:
    """Set this process up for measuring: no limit and no malloc settings on a CPU; on CUDA, the budget's share."""
    cuda = job.options.device != "cpu"
    if cuda and job.options.budget_bytes is not None:
        total = torch.cuda.get_device_properties(job.options.device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, job.options.budget_bytes / total), job.options.device)
    timed = _on_cuda if cuda else _on_cpu
    return lambda job, session: _with_operations(timed(job, session), session)


def _with_operations(result: Finished, session: Session) -> Finished:
    """Add what is counted last, after times and peaks are read: counting runs a step, which near the end of memory may
    need more than the cell did."""
    try:
        return msgspec.structs.replace(result, graphs=session.graphs(), operations=session.operations())
    except OutOfMemory:
        return msgspec.structs.replace(result, graphs=session.graphs())


def _on_cpu(job: Job, session: Session) -> Finished:
    return _timed(job, session.call, session.clock)


def _timed(job: Job, call: Callable[[], Call], clock: Callable[[], float]) -> Finished:
    done = timing.measure(call, clock, timing.rule(job.timing, job.cell_seconds))
    return Finished(0, 0.0, done.samples, done.warm_up, done.stop, done.tokens)


def _on_cuda(job: Job, session: Session) -> Finished:
    """Measure, with the allocator's own peaks: of the very first call apart, where workspaces are made."""
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
