"""The one seam in front of the expensive thing: a loaded subject that can run cells. A Protocol and its values only.

Every runtime is one file that exports `NAME`, `SIMULATED` and `open_session(subject, options) -> Session`. Timing,
memory and outcomes are decided outside, by the same code for every runtime, simulated ones included.
"""

from __future__ import annotations

from typing import Protocol

import msgspec

from bench.measurement import Graphs


class Options(msgspec.Struct, frozen=True):
    """How to load: dtype and attention by name, device ("cpu", "cuda:0"), seed, compute threads, budget in bytes."""

    dtype: str
    attention: str
    device: str
    seed: int
    threads: int
    budget_bytes: int | None = None


class Call(msgspec.Struct, frozen=True):
    """One generation, synchronised at both ends. Seconds. `tokens`: new tokens produced, all sequences together."""

    call_s: float
    prefill_s: float
    step_s: tuple[float, ...]
    tokens: int
    device_s: float | None = None


class OutOfMemory(Exception):
    """Raised by a session where an allocation failed, whatever the runtime or device calls it; text = the original."""


class Session(Protocol):
    """A subject on a device, in one runtime. Cells run with batch ascending; every method may raise OutOfMemory."""

    def clock(self) -> float:
        """Return seconds of the session's own clock (virtual in a simulation); the only clock timing may use."""
        ...

    def prepare(self, batch: int, prompt: int, output: int) -> None:
        """Allocate inputs and caches for a cell, outside any timed region. Frees those of the cell before."""
        ...

    def call(self) -> Call:
        """Run one whole generation of exactly `output` tokens."""
        ...

    def probe(self) -> None:
        """Reach the cell's peak memory at the least cost: one prefill and one step at the last position."""
        ...

    def graphs(self) -> Graphs | None:
        """Return what was compiled or captured for the prepared cell so far; None where this runtime does neither."""
        ...

    def operations(self) -> dict[str, int] | None:
        """Return how often one decode step of the prepared cell calls each operation; None where none is called.

        Runs a step of its own, outside any timed region; the cell must be prepared again before the next call.
        """
        ...

    def kernel_seconds(self) -> float | None:
        """Return the seconds that a device's kernels run in one decode step of the prepared cell, by the profiler.

        None where that says nothing: on a CPU, in a simulation, where steps are not ours. Otherwise as `operations`.
        """
        ...

    def generate(self, prompt_ids: list[list[int]], output: int) -> list[list[int]]:
        """Return the greedy new tokens for equal-length prompts, (B, output): what agreement tests compare."""
        ...

    def close(self) -> None:
        """Free the subject."""
        ...
