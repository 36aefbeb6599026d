"""Decoding with one preallocated cache of exactly prompt + output - 1 slots: the same step at every position.

Each step reads all slots, filled or not: that is what a step costs once it is compiled or captured.
"""

from __future__ import annotations

from bench.runtimes import loading
from bench.runtimes.caches import Preallocated
from bench.runtimes.loop import Loop
from bench.runtimes.protocol import Options, Session
from bench.subjects import Subject

NAME = "static"
SIMULATED = False


def open_session(subject: Subject, options: Options) -> Session:
    """Return a session of `subject`."""
    model, _ = loading.load(subject, options)
    return Loop(model, options, Preallocated)
