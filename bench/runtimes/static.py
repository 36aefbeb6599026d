"""Decoding with one preallocated cache of exactly prompt + output - 1 slots: the same step at every position.

Each step reads all slots, filled or not: that is what a step costs once it is compiled or captured.
"""

from __future__ import annotations

from typing import Any

from transformers.cache_utils import Cache, StaticCache

from bench.runtimes import loading
from bench.runtimes.loop import Loop
from bench.runtimes.protocol import Options, Session
from bench.subjects import Subject

NAME = "static"
SIMULATED = False


class Preallocated:
    """One static cache for all calls of a cell, emptied before each."""

    def __init__(self, config: Any, slots: int) -> None:
        self._cache = StaticCache(config=config, max_cache_len=slots)

    def fresh(self) -> Cache:
        """Return the cache, emptied."""
        self._cache.reset()
        return self._cache

    def advance(self, cache: Cache, tokens: int) -> None:
        """Set every layer's count of cached tokens; its slots are allocated and written since the prefill."""
        layers: list[Any] = cache.layers
        for layer in layers:
            layer.cumulative_length.fill_(tokens)


def open_session(subject: Subject, options: Options) -> Session:
    """Return a session of `subject`."""
    model, _ = loading.load(subject, options)
    return Loop(model, options, Preallocated)
