"""What a failure means: out of memory is an outcome of a cell, anything else that goes wrong is a failed cell.

Pure. The inputs are what a parent can know about a child: the text of an exception, an exit code, a signal. Some signs
mean "out of memory" only where the child ran under a memory limit: elsewhere the same sign is a crash.
"""

from __future__ import annotations

import re
import signal as signals

import msgspec

from bench.measurement import Outcome

# Exception texts of allocators and of libraries whose allocation failed, on any device.
_ALLOCATION = re.compile(
    r"DefaultCPUAllocator: can't allocate memory"
    r"|out of memory"  # torch.OutOfMemoryError, cudaErrorMemoryAllocation, CUDA driver
    r"|CUBLAS_STATUS_ALLOC_FAILED"
    r"|CUBLAS_STATUS_NOT_INITIALIZED when calling `?cublasCreate"  # the handle's workspace did not fit
    r"|CUDNN_STATUS_ALLOC_FAILED"
    r"|\bMemoryError\b"
    r"|std::bad_alloc"
    r"|[Cc]annot allocate memory"
    r"|Unable to allocate",
)
# oneDNN could not map a page for a generated kernel: seen under a memory limit in 16 bits, and never without one.
_ALLOCATION_UNDER_LIMIT = re.compile(r"could not create a primitive|could not create a memory|can't start new thread")
# Below this limit a code page that cannot be mapped has been seen to end in SIGSEGV; above it a SIGSEGV is a crash.
_SEGFAULT_LIMIT_BYTES = 32 << 20


class Verdict(msgspec.Struct, frozen=True):
    """An outcome and the reason for it, one line."""

    outcome: Outcome
    reason: str


def one_line(text: str, limit: int = 300) -> str:
    """Return `text` on one line, cut to `limit` characters: what fits in a row of results."""
    flat = " ".join(text.split())
    return flat if len(flat) <= limit else flat[: limit - 1] + "…"


def is_out_of_memory(text: str, *, limited: bool = False) -> bool:
    """Return whether an exception's text says that an allocation failed. `limited`: it ran under a memory limit."""
    return bool(_ALLOCATION.search(text) or (limited and _ALLOCATION_UNDER_LIMIT.search(text)))


def classify(text: str | None, exit_code: int | None, signal: int | None, *, limit_bytes: int | None = None) -> Verdict:
    """Return what an unfinished cell came to.

    `text`: the exception as "Type: message", None where the process ended without a word; `exit_code`: None for an
    exception that left the process alive; `signal`: what killed it; `limit_bytes`: the memory limit it ran under.
    """
    if signal is None and exit_code is not None and exit_code > 128:  # how a shell reports a signal
        signal = exit_code - 128
    if text and is_out_of_memory(text, limited=limit_bytes is not None):
        return Verdict("oom", one_line(text))
    if signal is not None:
        return _by_signal(signal, limit_bytes)
    if text:
        return Verdict("failed", one_line(text))
    return Verdict("failed", f"the process ended with exit code {exit_code} before the cell was finished")


def _by_signal(signal: int, limit_bytes: int | None) -> Verdict:
    name = signals.Signals(signal).name if signal in set(signals.Signals) else f"signal {signal}"
    if signal == signals.SIGKILL:
        return Verdict("oom", "killed by SIGKILL: the host ran out of memory, or someone ended the process")
    if signal == signals.SIGABRT and limit_bytes is not None:
        return Verdict("oom", "aborted under the memory limit (std::bad_alloc ends a process this way)")
    if signal == signals.SIGSEGV and limit_bytes is not None and limit_bytes < _SEGFAULT_LIMIT_BYTES:
        return Verdict("oom", "SIGSEGV under a memory limit too small to map generated code")
    return Verdict("failed", f"the process was ended by {name} before the cell was finished")
