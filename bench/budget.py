"""Memory budgets and memory peaks of the calling process on Linux: one process, measured and limited from inside.

On a CPU a budget is RLIMIT_DATA: the process's data size after imports and a tiny warm-up run, plus the budget. Real
allocation failures follow, exact to the batch. Conditions, each measured: RLIMIT_DATA and not RLIMIT_AS (file maps and
address reservations would count); a fixed mmap threshold (glibc's own grows and fragments the heap, which costs a
quarter of the budget) and laid-out heaps (both `bench.heap`); the buffers that BLAS keeps grown to their full size
before the baseline is read (see `bench.runtimes.loading.warm_up`); a fresh process.
"""

from __future__ import annotations

import os
import resource
from pathlib import Path

from bench import heap

_RESET_PEAK = "5"  # what /proc/self/clear_refs takes to set the peak resident size to the present one

# Says in the environment's fingerprint how memory was measured on a CPU.
METHOD = f"VmHWM in a process of its own, mmap threshold {heap.MMAP_THRESHOLD_BYTES >> 10} KiB; budget = RLIMIT_DATA"


def limit_data(extra_bytes: int) -> int:
    """Let this process's data grow by `extra_bytes` from now on and no further; return the limit set, in bytes."""
    limit = data_bytes() + extra_bytes
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    return limit


def data_bytes() -> int:
    """Return the size of this process's data as its limit counts it, in bytes."""
    return _status("VmData")


def is_limited() -> bool:
    """Return whether this process runs under a data limit."""
    return resource.getrlimit(resource.RLIMIT_DATA)[0] != resource.RLIM_INFINITY


def reset_peak() -> bool:
    """Set the peak resident size to the present one; False where the system refuses (a read-only /proc)."""
    try:
        Path("/proc/self/clear_refs").write_text(_RESET_PEAK)
    except OSError:
        return False
    return True


def resident_bytes() -> int:
    """Return the resident size of this process, in bytes."""
    return _status("VmRSS")


def peak_bytes() -> int:
    """Return the largest resident size since the last reset_peak, in bytes."""
    return _status("VmHWM")


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return int(value.split()[0]) << 10
    raise AssertionError(f"/proc/self/status has no {field}")


def available_bytes() -> int:
    """Return the host memory a new process may use without swapping or being killed: the system's, or the cgroup's."""
    import psutil

    free = int(psutil.virtual_memory().available)
    allowed = cgroup_free(Path("/sys/fs/cgroup"))
    return free if allowed is None else min(free, allowed)


def cgroup_free(root: Path) -> int | None:
    """Return what the control group mounted at `root` (version 2 or 1) leaves, in bytes; None without a limit."""
    pairs = (("memory.max", "memory.current"), ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"))
    for limit, used in pairs:
        try:
            top = (root / limit).read_text().strip()
            now = (root / used).read_text().strip()
        except OSError:
            continue
        if top.isdigit() and int(top) < os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"):
            return max(int(top) - int(now), 0)
    return None
