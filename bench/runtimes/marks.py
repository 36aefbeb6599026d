"""When each token was done, without holding the device up: host clock readings on a CPU, one event a step on CUDA.

Events are made before the timed region and read after it.
"""

from __future__ import annotations

from itertools import pairwise
from time import perf_counter
from typing import Protocol

import torch

from bench.runtimes.protocol import Call


class Marks(Protocol):
    """The times of one call: `start`, a `mark` after each of `output` tokens, `finish`."""

    def start(self) -> None:
        """Wait for the device, and begin."""
        ...

    def mark(self) -> None:
        """Note that the work submitted so far includes one more token."""
        ...

    def finish(self, tokens: int) -> Call:
        """Wait for the device, and return the call's times; `tokens` counts what it produced."""
        ...


class HostMarks:
    """The host's clock, for a device that works while we wait."""

    def __init__(self) -> None:
        self._times: list[float] = []

    def start(self) -> None:
        """Begin."""
        self._times = [perf_counter()]

    def mark(self) -> None:
        """Read the clock."""
        self._times.append(perf_counter())

    def finish(self, tokens: int) -> Call:
        """Return the call's times."""
        end, times = perf_counter(), self._times
        steps = tuple(after - before for before, after in pairwise(times[1:]))
        return Call(end - times[0], times[1] - times[0], steps, tokens)


class EventMarks:
    """CUDA events, with the host's clock around the synchronised call."""

    def __init__(self, output: int, device: str) -> None:
        self._device = device
        self._events = [torch.cuda.Event(enable_timing=True) for _ in range(output + 1)]
        self._next = 0
        self._began = 0.0

    def start(self) -> None:
        """Wait for the device, and begin."""
        self._next = 0
        torch.cuda.synchronize(self._device)
        self._began = perf_counter()
        self.mark()

    def mark(self) -> None:
        """Record an event; the host does not wait for it."""
        self._events[self._next].record()
        self._next += 1

    def finish(self, tokens: int) -> Call:
        """Wait for the device, and return the call's times."""
        torch.cuda.synchronize(self._device)
        call_s = perf_counter() - self._began
        steps = [before.elapsed_time(after) / 1e3 for before, after in pairwise(self._events)]
        device_s = self._events[0].elapsed_time(self._events[-1]) / 1e3
        return Call(call_s, steps[0], tuple(steps[1:]), tokens, device_s)


def marks(output: int, device: str) -> Marks:
    """Return the marks of a call of `output` tokens on a device."""
    return HostMarks() if device == "cpu" else EventMarks(output, device)
