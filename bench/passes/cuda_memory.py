"""Memory of a CUDA device: what a process leaves of it for a budget, and the numbers of a cell beside the allocator's.

A budget of B bytes is emulated by ballast that leaves exactly B bytes free once the context exists, where no other
process holds memory on the device: then every allocation counts, the workspaces of libraries too. Where others hold
some, that would move under us, so the allocator's share of memory is limited instead, which misses what is allocated
past it (context, workspaces of cuBLAS).
"""

from __future__ import annotations

from types import TracebackType
from typing import Any, NamedTuple

import torch

from bench import nvml
from bench.measurement import Memory
from bench.runtimes.protocol import Options, OutOfMemory

# Drivers and other contexts keep a little of a device that runs nothing; more than this is somebody's.
IDLE_BYTES = 1 << 30
SHARE = "kept by the allocator's share of memory: context and workspaces of libraries are not counted"
HELD_BACK = "kept by ballast: all but the budget is held back once the context exists, which is not counted"


class Ballast(NamedTuple):
    """Memory held back for a budget: its tensor (None where there is none), its bytes, and how the budget is kept."""

    held: torch.Tensor | None = None
    bytes: int = 0
    how: str = ""


def idle_bytes(device: str) -> int | None:
    """Return what is used of the device before this process has a context; None where NVML does not say."""
    return nvml.used_bytes(torch.device(device).index or 0)


def limit(options: Options, idle: int | None) -> Ballast:
    """Hold this process to the budget of `options` on a device of which `idle` bytes were used before; see above.

    Raises OutOfMemory where the device has less than the budget free.
    """
    wanted = options.budget_bytes
    if wanted is None:
        return Ballast()
    free, total = torch.cuda.mem_get_info(options.device)
    if wanted > free:
        raise OutOfMemory(f"the budget of {wanted} bytes is more than the {free} bytes free on {options.device}")
    if idle is None or idle > IDLE_BYTES or nvml.other_processes(torch.device(options.device).index or 0):
        torch.cuda.set_per_process_memory_fraction(wanted / total, options.device)
        return Ballast(how=SHARE)
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info(options.device)
    size = free - wanted
    return Ballast(torch.empty(size, dtype=torch.uint8, device=options.device), size, HELD_BACK)


class Peaks:
    """A context manager around the work of a cell: the allocator's peaks, and the device's use after it."""

    def __init__(self, device: str, idle: int | None, ballast: Ballast) -> None:
        self._device, self._idle, self._ballast = device, idle, ballast
        self._memory: dict[str, Any] = {}

    def __enter__(self) -> Peaks:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(self._device)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if kind is not None:
            return
        held = self._ballast.bytes
        reserved = torch.cuda.max_memory_reserved(self._device)
        self._memory = {
            "allocated": torch.cuda.max_memory_allocated(self._device) - held,
            "reserved": reserved - held,
        }
        used = nvml.used_bytes(torch.device(self._device).index or 0)
        if used is not None and self._idle is not None:
            self._memory["device_used"] = used - self._idle - held
            # What the process holds past its allocator: the context, workspaces, the code of kernels.
            self._memory["context"] = used - self._idle - torch.cuda.memory_reserved(self._device)

    def memory(self, first_call: int | None, reason: str = "") -> Memory:
        """Return the numbers; `reason` is why there is no peak of the first call."""
        reasons = {"first_call": reason} if first_call is None else {}
        reasons |= {"budget": self._ballast.how} if self._ballast.how else {}
        if "device_used" not in self._memory:
            reasons |= dict.fromkeys(("device_used", "context"), "NVML does not say how much of the device is used")
        first = None if first_call is None else first_call - self._ballast.bytes
        return Memory(**self._memory, first_call=first, reasons=reasons)
