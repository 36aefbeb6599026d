"""Reaches the peak memory of each cell, on a CPU under a data limit, and reports it (see `budget`)."""

from __future__ import annotations

from bench import budget, runtimes
from bench.jobs import Finished, Job, Measure
from bench.measurement import Memory
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
SEPARATE = "the memory pass sees one peak"


def open_pass(job: Job) -> Measure:
    """Set this process up for probing under a limit (see `budget`): everything but the subject is there before it."""
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
        reasons = {"reserved": NO_ALLOCATOR, "device_used": NO_DEVICE, "context": NO_DEVICE, "first_call": SEPARATE}
        if not resets:
            reasons["allocated"] = "the kernel refuses to reset the peak (/proc/self/clear_refs)"
        peak = max(budget.peak_bytes() - baseline, 0) if resets else None
        return Finished(0, 0.0, memory=Memory(allocated=peak, reasons=reasons))

    return probe
