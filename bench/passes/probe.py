"""Reaches the peak memory of each cell under its budget, and reports it.

On a CPU a budget is a data limit (see `bench.budget`). A probe is one prefill and the last step at a full cache, where
a generation is largest; `certify` runs the whole generation instead.
"""

from __future__ import annotations

import gc

import msgspec

from bench import budget, heap, runtimes
from bench.jobs import Finished, Job, Measure
from bench.measurement import Memory
from bench.passes import cuda_memory
from bench.runtimes import loading
from bench.runtimes.protocol import Session
from bench.subjects import Subject
from shortllama.shape import ModelShape

# A model too small to matter: running it once starts threads and loads code, which belongs to no cell.
_TINY = ModelShape.uniform(
    vocabulary=64, hidden=32, head_dim=8, blocks=2, query_heads=4, kv_heads=2, neurons=64, tied=True
)

NO_ALLOCATOR = "a CPU has no caching allocator"
NO_DEVICE = "a CPU has no memory of its own"
SEPARATE = "a probe sees one peak"


def open_pass(job: Job) -> Measure:
    """Set this process up for probing under the job's budget: everything but the subject is there before it."""
    return _on_cpu(job) if job.options.device == "cpu" else _on_cuda(job)


def _reach_peak(job: Job, session: Session) -> None:
    if job.purpose == "certify":
        session.call()
    else:
        session.probe()


def _on_cpu(job: Job) -> Measure:
    assert job.limit_bytes is not None
    heap.fix_malloc()
    _warm_up(job)
    loading.warm_up(job.subject, job.options)
    heap.settle()
    heap.lay_out()
    baseline = budget.resident_bytes()
    budget.limit_data(job.limit_bytes)

    def probe(job: Job, session: Session) -> Finished:
        gc.collect()
        resets = budget.reset_peak()
        _reach_peak(job, session)
        reasons = {"reserved": NO_ALLOCATOR, "device_used": NO_DEVICE, "context": NO_DEVICE, "first_call": SEPARATE}
        if not resets:
            reasons["allocated"] = "the kernel refuses to reset the peak (/proc/self/clear_refs)"
        peak = max(budget.peak_bytes() - baseline, 0) if resets else None
        return Finished(0, 0.0, memory=Memory(allocated=peak, reasons=reasons))

    return probe


def _on_cuda(job: Job) -> Measure:
    idle = cuda_memory.idle_bytes(job.options.device)
    _warm_up(job)
    held = cuda_memory.limit(job.options, idle)

    def probe(job: Job, session: Session) -> Finished:
        with cuda_memory.Peaks(job.options.device, idle, held) as peaks:
            _reach_peak(job, session)
        return Finished(0, 0.0, memory=peaks.memory(first_call=None, reason=SEPARATE))

    return probe


def _warm_up(job: Job) -> None:
    shape = msgspec.structs.replace(_TINY, quantised=job.subject.shape.quantised)
    tiny = runtimes.load(job.runtime).open_session(Subject("warm-up", shape, "warm-up"), job.options)
    tiny.prepare(1, 4, 3)
    tiny.call()
    tiny.probe()
    tiny.close()
