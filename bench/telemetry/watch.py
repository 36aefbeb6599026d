"""A sweep's telemetry, cell by cell: what the runner hears of a child, as windows of the sampler and dicts of rows."""

from __future__ import annotations

from types import TracebackType
from typing import Any

from bench.telemetry import fields, window
from bench.telemetry.client import Sampler
from bench.telemetry.readings import Loop

NOT_ASKED = "the sweep was to read no telemetry; give --telemetry"


class Watch:
    """A context manager that holds the sweep's sampler, if it has one.

    `index`: CUDA's device, None on a CPU; `sampled`: whether cells are called again for the sampler. On a CPU that is
    all that is read; on CUDA, counters and event bits are read at the edges of each cell's timing in any case.
    """

    def __init__(self, index: int | None = None, *, sampled: bool = False) -> None:
        self._cuda = index is not None
        self._sampler = Sampler(index) if sampled or self._cuda else None
        if self._sampler and sampled:
            self._sampler.idle()
        self._pid: int | None = None
        self._uuid: str | None = None

    def __enter__(self) -> Watch:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._sampler:
            self._sampler.close()

    def loaded(self, pid: int, uuid: str | None) -> None:
        """A child is there, on the device that it calls `uuid`."""
        self._pid, self._uuid = pid, uuid

    def began(self) -> None:
        """A cell is prepared, warmed up and timed from now on."""
        if self._sampler and self._cuda:
            self._sampler.begin(self._pid, self._uuid, sampled=False)

    def finished(self) -> dict[str, Any]:
        """The cell was timed; return its row's telemetry as far as it is known now."""
        if not self._sampler or not self._cuda:
            return {}
        return window.merged(self._sampler.end(None), fields.absent(NOT_ASKED))

    def looping(self) -> None:
        """The cell is called again for the sampler from now on."""
        if self._sampler:
            self._sampler.begin(self._pid, self._uuid)

    def looped(self, loop: Loop, timed: dict[str, Any]) -> dict[str, Any]:
        """The cell was called again; return its row's telemetry. `timed`: what `finished` returned."""
        return window.merged(timed, self._sampler.end(loop)) if self._sampler else timed

    def broke(self, reason: str, timed: dict[str, Any]) -> dict[str, Any]:
        """The child ended while it called the cell again; return its row's telemetry."""
        return window.merged(timed, fields.absent(f"when it was called for the sampler: {reason}"))
