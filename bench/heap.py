"""The heaps of the calling process, arranged so that equal runs take equally much from a data limit (glibc, Linux).

What a tensor costs must not depend on what was freed before. So anything above a fixed threshold is mapped by itself
and given back at once (`fix_malloc`), and before a limit is set the heaps are laid out (`lay_out`), since three things
made equal processes differ by MiBs: holes that imports leave in the heap, wherever hash seeds put them, take tensors
for nothing; small blocks make the heap grow in steps; and Python's own arenas are a MiB each. All of it slows a process
down: use it where memory is measured, never where time is.
"""

from __future__ import annotations

import ctypes
import gc
from pathlib import Path
from typing import Any

_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
MMAP_THRESHOLD_BYTES = 32 << 10
TRIM_THRESHOLD_BYTES = 128 << 10

# A hole from which a neighbour's freeing could make one that takes a tensor.
_LARGE_HOLE_BYTES = MMAP_THRESHOLD_BYTES * 3 // 4
_SMALL_HOLE_BYTES = MMAP_THRESHOLD_BYTES - (1 << 10)
_SMALL_BYTES = 8 << 20
_HELD_BYTES = 64
_ARENA_BYTES = 1 << 20
_ARENAS = 4
# Of pymalloc's small objects, which are at most 512 bytes.
_OBJECT_BYTES = 512

_kept: list[object] = []


def fix_malloc() -> bool:
    """Fix glibc's mmap and trim thresholds for this process; False where the C library has no such settings."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    return bool(mallopt(_M_MMAP_THRESHOLD, MMAP_THRESHOLD_BYTES) and mallopt(_M_TRIM_THRESHOLD, TRIM_THRESHOLD_BYTES))


def settle() -> None:
    """Collect garbage and hand freed heap pages back, so that what is read next is what is really held."""
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (OSError, AttributeError):
        pass  # not glibc: the collection alone has to do


def lay_out() -> bool:
    """Leave no hole for a tensor and much room for small things; False where the C library is not glibc.

    Call it after `fix_malloc` and `settle`, when all that belongs to no cell is there, before the limit; `settle` would
    later give back the pages that it made ready. What it takes it keeps for good.
    """
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallopt"):
        return False
    libc.malloc.restype = libc.realloc.restype = ctypes.c_void_p
    libc.malloc.argtypes, libc.free.argtypes = [ctypes.c_size_t], [ctypes.c_void_p]
    libc.realloc.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    _keep_arenas()
    _fill_holes(libc, _LARGE_HOLE_BYTES)
    _make_small_holes(libc)
    _fill_holes(libc, MMAP_THRESHOLD_BYTES)  # what growing left at the heap's end
    return True


def _keep_arenas() -> None:
    """Make Python take arenas and keep an object in each, so that none is given back or has to be asked for again."""
    objects = [bytes(_OBJECT_BYTES - 64) for _ in range(_ARENAS * _ARENA_BYTES // _OBJECT_BYTES)]
    _kept.extend({id(one) // _ARENA_BYTES: one for one in objects}.values())


def _fill_holes(libc: Any, least: int) -> None:
    """Allocate every free piece of the heap of `least` bytes or more, largest first.

    Below the mmap threshold the heap grows where no hole is left; what it grew by is kept, or it would be a hole.
    """
    start, end = _heap()
    size = end - start
    while size >= least:
        block = libc.malloc(size)
        if block is not None and start <= block and block + size <= end:
            continue  # a hole of that size, and perhaps another
        if size >= MMAP_THRESHOLD_BYTES:
            libc.free(block)  # mapped by itself
        size = int(size * 0.98) & ~15


def _make_small_holes(libc: Any) -> None:
    """Grow the heap by pieces below the mmap threshold, each free but for its first bytes, which keep them apart.

    They are written to: pages that small things touch later would otherwise count as a cell's peak.
    """
    blocks = [libc.malloc(_SMALL_HOLE_BYTES) for _ in range(_SMALL_BYTES // _SMALL_HOLE_BYTES)]
    for block in blocks:
        ctypes.memset(block, 1, _SMALL_HOLE_BYTES)
    for block in blocks:
        libc.realloc(block, _HELD_BYTES)


def _heap() -> tuple[int, int]:
    """Return the addresses where the main heap begins and ends: a fork leaves it in several maps."""
    lines = [line for line in Path("/proc/self/maps").read_text().splitlines() if line.endswith("[heap]")]
    ends = [int(end, 16) for line in lines for end in line.split()[0].split("-")]
    return (min(ends), max(ends)) if ends else (0, 0)
