"""Plain eager decoding with a cache that grows by concatenation: what most people run."""

from __future__ import annotations

from typing import Any

from transformers.cache_utils import Cache, DynamicCache

from bench.runtimes import loading
from bench.runtimes.loop import Loop
from bench.runtimes.protocol import Options, Session
from bench.subjects import Subject

NAME = "eager"
SIMULATED = False


class Growing:
    """Dynamic caches: a new one for every call."""

    def __init__(self, config: Any, slots: int) -> None:
        self._config = config

    def fresh(self) -> Cache:
        """Return an empty cache."""
        return DynamicCache(config=self._config)

    def advance(self, cache: Cache, tokens: int) -> None:
        """Replace each layer's keys and values by ones of `tokens` positions, written so that they are resident."""
        layers: list[Any] = cache.layers
        for layer in layers:
            batch, heads, _, width = layer.keys.shape
            for name in ("keys", "values"):
                grown = getattr(layer, name).new_empty((batch, heads, tokens, width))
                setattr(layer, name, grown.fill_(0.01))


def open_session(subject: Subject, options: Options) -> Session:
    """Return a session of `subject`."""
    model, _ = loading.load(subject, options)
    return Loop(model, options, Growing)
