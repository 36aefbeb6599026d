"""Plain eager decoding with a cache that grows by concatenation: what most people run."""

from __future__ import annotations

from bench.runtimes import loading
from bench.runtimes.caches import Growing
from bench.runtimes.loop import Loop
from bench.runtimes.protocol import Options, Session
from bench.subjects import Subject

NAME = "eager"
SIMULATED = False


def open_session(subject: Subject, options: Options) -> Session:
    """Return a session of `subject`."""
    model, _ = loading.load(subject, options)
    return Loop(model, options, Growing)
