"""The child's side: calls a cell again and again while the sampler watches. Its times are not the cell's."""

from __future__ import annotations

import time
from collections.abc import Callable

from bench.cells import Cell
from bench.runtimes.protocol import Session
from bench.telemetry.readings import Loop

# Seconds of calls by kind of machine: for means 2 s, for spans of the energy counter 3 s and room for their ends.
SECONDS = {"cpu": 2.0, "cuda": 4.5}


def run(session: Session, cell: Cell, seconds: float, began: Callable[[], None]) -> Loop:
    """Call a cell for `seconds` or longer, at least once; `began` is called right before.

    May raise OutOfMemory. The cell is prepared anew: what ran after it was timed may have left it half way.
    """
    session.prepare(cell.batch, cell.prompt, cell.output)
    session.probe()  # the first call after that is slower, and the sampler is to see the others
    began()
    since, calls, tokens = time.monotonic(), 0, 0
    while True:
        tokens += session.call().tokens
        calls += 1
        until = time.monotonic()
        if until - since >= seconds:
            return Loop(since, until, calls, tokens)
