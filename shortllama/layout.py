"""Every tensor of a model by name and dimensions, and where each tensor of a pruned model comes from. Pure.

The one place that knows which axis of which projection a KV group or a neuron is. Surgery applies it to modules on
meta and on real weights, `checkpoint` to files; nothing here loads anything.
"""

from __future__ import annotations

from typing import NamedTuple

from shortllama.families import Family, lookup
from shortllama.families.family import ATTENTION_PROJECTIONS, MLP_PROJECTIONS
from shortllama.plan import BlockKeep, kept_groups, kept_neurons
from shortllama.shape import BlockShape, ModelShape

Dimensions = tuple[int, ...]


class Slice(NamedTuple):
    """A tensor of the base, and the rows (axis 0) and columns (axis 1) taken from it; None takes all."""

    source: str
    rows: tuple[int, ...] | None = None
    columns: tuple[int, ...] | None = None


def tensors(shape: ModelShape) -> dict[str, Dimensions]:
    """Return the dimensions of every parameter of a model of `shape`, by its name in transformers.

    A tied output head is left out: it is the embedding. The sizes add up to `shape.parameters`.
    """
    family = lookup(shape.family)
    found: dict[str, Dimensions] = {f"{family.embedding}.weight": (shape.vocabulary, shape.hidden)}
    for index, block in enumerate(shape.blocks):
        for name, dimensions in _block_tensors(family, shape, block).items():
            found[f"{family.blocks}.{index}.{name}"] = dimensions
    found[f"{family.final_norm}.weight"] = (shape.hidden,)
    if not shape.tied:
        found[f"{family.head}.weight"] = (shape.vocabulary, shape.hidden)
    return found


def _block_tensors(family: Family, shape: ModelShape, block: BlockShape) -> dict[str, Dimensions]:
    found: dict[str, Dimensions] = {}
    hidden, queries, keys = shape.hidden, block.query_heads * shape.head_dim, block.kv_heads * shape.head_dim
    sizes = {
        "q": (queries, hidden),
        "k": (keys, hidden),
        "v": (keys, hidden),
        "o": (hidden, queries),
        "gate": (block.neurons, hidden),
        "up": (block.neurons, hidden),
        "down": (hidden, block.neurons),
    }
    present = (ATTENTION_PROJECTIONS if block.query_heads else ()) + (MLP_PROJECTIONS if block.neurons else ())
    for short in present:
        found[f"{family.projections[short]}.weight"] = sizes[short]
        if short in shape.biases:
            found[f"{family.projections[short]}.bias"] = sizes[short][:1]
    if block.query_heads:
        found |= {f"{name}.weight": (shape.head_dim,) for name in family.head_norms}
        found |= {f"{name}.weight": (hidden,) for name in family.attention_norms}
    if block.neurons:
        found |= {f"{name}.weight": (hidden,) for name in family.mlp_norms}
    return found


def slices(shape: ModelShape, keep: tuple[BlockKeep, ...]) -> dict[str, Slice]:
    """Return, for each tensor that keeping `keep` of `shape` leaves, the part of the base that it is.

    Names are those of the result (blocks renumbered from 0). The query heads of KV group g are rows
    [g r d, (g + 1) r d) of q and columns of o, r queries a group: the order of transformers' `repeat_kv`.
    """
    family = lookup(shape.family)
    found = {name: Slice(name) for name in tensors(shape) if not name.startswith(f"{family.blocks}.")}
    for index, one in enumerate(keep):
        block = shape.blocks[one.index]
        axes = _kept_axes(shape, block, one)
        groups, neurons = len(kept_groups(one, block)), len(kept_neurons(one, block))
        per_group = block.query_heads // block.kv_heads if block.kv_heads else 0
        left = BlockShape(groups * per_group, groups, neurons)
        for name in _block_tensors(family, shape, left):
            rows, columns = axes_of(family, name, axes)
            found[f"{family.blocks}.{index}.{name}"] = Slice(f"{family.blocks}.{one.index}.{name}", rows, columns)
    return found


def _kept_axes(shape: ModelShape, block: BlockShape, keep: BlockKeep) -> dict[str, tuple[int, ...] | None]:
    """Return the kept positions along the axes "queries", "keys" and "neurons"; None where all are kept."""
    groups = kept_groups(keep, block)
    per_group = shape.head_dim * (block.query_heads // block.kv_heads) if block.kv_heads else 0
    return {
        "queries": None if keep.kv_groups is None else _expand(groups, per_group),
        "keys": None if keep.kv_groups is None else _expand(groups, shape.head_dim),
        "neurons": None if keep.neurons is None else kept_neurons(keep, block),
    }


def _expand(groups: tuple[int, ...], size: int) -> tuple[int, ...]:
    return tuple(group * size + offset for group in groups for offset in range(size))


# Which axis of the block each projection's rows (outputs) and columns (inputs) run along; None: the hidden size.
_AXES: dict[str, tuple[str | None, str | None]] = {
    "q": ("queries", None),
    "k": ("keys", None),
    "v": ("keys", None),
    "o": (None, "queries"),
    "gate": ("neurons", None),
    "up": ("neurons", None),
    "down": (None, "neurons"),
}


def axes_of(
    family: Family, name: str, axes: dict[str, tuple[int, ...] | None]
) -> tuple[tuple[int, ...] | None, tuple[int, ...] | None]:
    """Return which of `axes` the rows and columns of a block's tensor run along; None for any other axis."""
    for short, path in family.projections.items():
        if name.startswith(f"{path}."):
            rows, columns = (axes[axis] if axis else None for axis in _AXES[short])
            return rows, (columns if name.endswith(".weight") else None)
    return None, None
