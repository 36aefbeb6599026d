"""Measures the times of each cell; on CUDA the allocator's peaks too, which cost nothing there."""

from __future__ import annotations

from collections.abc import Callable

import msgspec
import torch

from bench import timing
from bench.jobs import Finished, Job, Measure
from bench.passes import cuda_memory
from bench.runtimes.protocol import Call, OutOfMemory, Session


def open_pass(job: Job) -> Measure:
    """Set this process up for measuring: no limit and no malloc settings on a CPU; on CUDA, the budget."""
    timed = _on_cpu if job.options.device == "cpu" else _on_cuda(job)
    profiled: list[bool] = []

    def measure(job: Job, session: Session) -> Finished:
        result = _with_operations(timed(job, session), session)
        if profiled:
            return result
        profiled.append(True)  # once a child: tracing takes a while, and memory of the host
        return _with_kernels(result, session)

    return measure


def _with_kernels(result: Finished, session: Session) -> Finished:
    try:
        return msgspec.structs.replace(result, kernel_s=session.kernel_seconds())
    except OutOfMemory:
        return result


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


def _on_cuda(job: Job) -> Measure:
    """Measure under the budget, with the allocator's own peaks: apart of the first call, where workspaces are made."""
    device = job.options.device
    idle = cuda_memory.idle_bytes(device)
    torch.cuda.init()
    held = cuda_memory.limit(job.options, idle)

    def measure(job: Job, session: Session) -> Finished:
        first: list[int] = []

        def call() -> Call:
            done = session.call()
            if not first:
                first.append(torch.cuda.max_memory_allocated(device))
                torch.cuda.reset_peak_memory_stats(device)
            return done

        with cuda_memory.Peaks(device, idle, held) as peaks:
            result = _timed(job, call, session.clock)
        return msgspec.structs.replace(result, memory=peaks.memory(first[0]))

    return measure
