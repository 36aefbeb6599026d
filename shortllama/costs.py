"""What work costs, measured between two moments: wall time and peak memory. Knows no criterion."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from shortllama.scores import Cost

_STATUS = Path("/proc/self/status")
_RESET = Path("/proc/self/clear_refs")


def start(device: Any = None) -> Callable[[], Cost]:
    """Return a function that returns the cost since now, without tokens: wall time and peak memory.

    Peak bytes are counted beyond what is held now (the model): of the allocations on `device` where that is CUDA, else
    of the process's resident memory, where the kernel lets its high-water mark be reset (Linux); null elsewhere. One
    measurement at a time: a second one resets the mark of the first.
    """
    cuda = getattr(device, "type", "cpu") == "cuda"
    started, held = time.perf_counter(), _allocated(device) if cuda else _resident()

    def cost() -> Cost:
        wall_s = round(time.perf_counter() - started, 6)
        if held is None:
            reason = "this system does not let a process reset the high-water mark of its memory"
            return Cost(wall_s, None, 0, reasons={"peak_bytes": reason})
        peak = sys.modules["torch"].cuda.max_memory_allocated(device) if cuda else _status_bytes("VmHWM")
        return Cost(wall_s, max(0, peak - held), 0)

    return cost


def _allocated(device: Any) -> int:
    """Start a new high-water mark on a CUDA device; return the bytes allocated now. The device came from torch."""
    cuda = sys.modules["torch"].cuda
    cuda.reset_peak_memory_stats(device)
    return cuda.memory_allocated(device)


def _resident() -> int | None:
    """Start a new high-water mark of the process; return the bytes resident now, None where it cannot be done."""
    try:
        _RESET.write_text("5")
        return _status_bytes("VmRSS")
    except OSError:
        return None


def _status_bytes(field: str) -> int:
    """Return a figure of /proc/self/status in bytes."""
    for line in _STATUS.read_text(encoding="ascii", errors="replace").splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")


def joined(before: Cost | None, now: Cost) -> Cost:
    """Return the cost of a run that went on after others that were killed: sums, and the highest peak."""
    if before is None:
        return now
    peaks = [one.peak_bytes for one in (before, now) if one.peak_bytes is not None]
    passes = [one.block_passes for one in (before, now)]
    return msgspec.structs.replace(
        now,
        wall_s=round(before.wall_s + now.wall_s, 6),
        peak_bytes=max(peaks, default=None),
        block_passes=None if None in passes else sum(filter(None, passes)),
        runs=before.runs + now.runs,
    )
