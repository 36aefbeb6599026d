"""A checkpoint folder opened for export, and its tensors as numpy arrays of raw bits, padded where asked."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from shortllama import checkpoint, configs, sources, tensorfile
from shortllama.exporting.padding import Placed
from shortllama.shape import ModelShape
from shortllama.tensorfile import Stored


@dataclass(frozen=True)
class Opened:
    """A folder with its shape, the stock part of its config, its tensors by name, and the dtype of most of them.

    `name` is for people: the last part of how the model was named, never a path.
    """

    name: str
    folder: Path
    shape: ModelShape
    config: configs.Config
    tensors: dict[str, Stored]
    dtype: str


def opened(model: str | Path) -> Opened:
    """Return a folder, hub id or `reference`, checked. Raises InputError where its weights are not whole."""
    source = sources.from_folder(str(model), model) if isinstance(model, Path) else sources.locate(model)
    folder = sources.fetch(source)
    assert source.config is not None
    tensors = checkpoint.stored_tensors(folder, source.shape)
    config = configs.base_config(source.config)
    return Opened(Path(source.name).name, folder, source.shape, config, tensors, checkpoint.stored_dtype(tensors))


def load(source: Opened, one: Placed) -> np.ndarray:
    """Return a tensor of `one.dimensions` as unsigned integers of its dtype's size: bits, so that none are changed."""
    stored = source.tensors.get(one.source or "")
    if stored is None:
        return np.zeros(one.dimensions, f"u{tensorfile.ITEM_BYTES[tensorfile.NAMES[source.dtype]]}")
    held = np.empty(stored.dimensions, f"u{tensorfile.ITEM_BYTES[stored.code]}")
    tensorfile.read(stored, held.data.cast("B"))
    if stored.dimensions == one.dimensions:
        return held
    values = np.zeros(one.dimensions, held.dtype)
    kept = [
        np.arange(size) if axis is None else np.asarray(axis) for size, axis in zip(held.shape, one[2:], strict=False)
    ]
    values[np.ix_(*kept)] = held
    return values
