"""The caches of transformers, layer by layer: made for a cell, emptied, and made as long as at a later position.

Layers keep keys and values of all tokens, those of a window, or a state of constant size (Mamba).
"""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache, StaticCache, StaticLayer

from shortllama import families
from shortllama.errors import InputError


def keyword(model: PreTrainedModel) -> str:
    """Return what the model's forward calls its cache. Raises InputError where decoding with it is wrong."""
    name = families.lookup(model.config.model_type).cache
    if name is None:
        family = model.config.model_type
        raise InputError(
            f"{family} decodes otherwise with its cache than without, in the transformers that is installed: the speed "
            "of wrong output means nothing; measure another family"
        )
    return name


class Growing:
    """Dynamic caches: a new one for every call."""

    def __init__(self, config: Any, slots: int) -> None:
        self._config = config

    def fresh(self) -> Cache:
        """Return an empty cache."""
        return DynamicCache(config=self._config)

    def advance(self, cache: Cache, tokens: int) -> None:
        """Replace each layer's keys and values by ones of `tokens` positions, written so that they are resident.

        A layer with a window keeps one position less than it; a state stays as it is.
        """
        layers: list[Any] = cache.layers
        for layer in layers:
            if not hasattr(layer, "keys"):
                continue
            kept = tokens
            if _rolls(layer):
                kept, layer.cumulative_length = min(tokens, layer.sliding_window - 1), tokens
            batch, heads, _, width = layer.keys.shape
            for name in ("keys", "values"):
                grown = getattr(layer, name).new_empty((batch, heads, kept, width))
                setattr(layer, name, grown.fill_(0.01))


class Preallocated:
    """One static cache for all calls of a cell, emptied before each.

    A window that no position of the cell leaves is none: such a layer is one without, whose step is the same at every
    position. Other windows roll.
    """

    def __init__(self, config: Any, slots: int) -> None:
        self._cache = StaticCache(config=config, max_cache_len=slots)
        layers: list[Any] = self._cache.layers
        for index, layer in enumerate(layers):
            if _rolls(layer) and layer.max_cache_len >= slots:
                layers[index] = StaticLayer(max_cache_len=slots)

    def fresh(self) -> Cache:
        """Return the cache, emptied."""
        self._cache.reset()
        return self._cache

    def advance(self, cache: Cache, tokens: int) -> None:
        """Set every layer's count of cached tokens; its slots are allocated and written since the prefill."""
        layers: list[Any] = cache.layers
        for layer in layers:
            if _rolls(layer):  # counts on the host too; on the device, no further than its slots
                layer.cumulative_length_int = tokens
            if hasattr(layer, "cumulative_length"):
                layer.cumulative_length.fill_(min(tokens, layer.max_cache_len))


class Steady(Preallocated):
    """A preallocated cache for steps that must be the same at every position."""

    def __init__(self, config: Any, slots: int) -> None:
        super().__init__(config, slots)
        layers: list[Any] = self._cache.layers
        windows = [layer.max_cache_len for layer in layers if _rolls(layer)]
        if windows:
            raise InputError(
                f"the cell has {slots} positions, and the model's window is {min(windows)}: its cache rolls, so that a "
                "step is not the same at every position; lower --prompt or --output, or give --runtime eager,static"
            )


def _rolls(layer: Any) -> bool:
    """Whether a layer keeps the last positions only; layers with a state do not say."""
    return getattr(layer, "is_sliding", False)
