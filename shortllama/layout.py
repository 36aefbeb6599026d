"""Every tensor of a model by name and dimensions, and where each tensor of a pruned model comes from. Pure.

The one place that knows which axis of which projection a KV group or a neuron is. Surgery applies it to modules on
meta and on real weights, `checkpoint` to files; nothing here loads anything.
"""

from __future__ import annotations

from typing import NamedTuple

from msgspec import UNSET

from shortllama.families import Family, lookup
from shortllama.families.family import ATTENTION_PROJECTIONS
from shortllama.plans import BlockKeep, kept_groups, kept_neurons, kept_queries
from shortllama.shape import BlockShape, ModelShape

Dimensions = tuple[int, ...]
Axes = dict[str, tuple[int, ...] | None]

_OF_ATTENTION = (*ATTENTION_PROJECTIONS, "qkv")


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
    found |= {name: (shape.hidden,) for name in _entry_norms(family, shape)}
    for leaf in ("weight", "bias")[: shape.final_norms]:
        found[f"{family.final_norm}.{leaf}"] = (shape.hidden,)
    if not shape.tied:
        found[f"{family.head}.weight"] = (shape.vocabulary, shape.hidden)
    return found


def _entry_norms(family: Family, shape: ModelShape) -> list[str]:
    """Name the vectors of the norm behind the embedding, which are stored with whatever block is first."""
    return [f"{family.blocks}.0.{family.entry_norm}.{leaf}" for leaf in ("weight", "bias")[: shape.entry_norms]]


def _block_tensors(family: Family, shape: ModelShape, block: BlockShape) -> dict[str, Dimensions]:
    if shape.mixer:
        return dict(shape.mixer)
    found: dict[str, Dimensions] = {}
    hidden, queries, keys = shape.hidden, block.query_heads * shape.head_dim, block.kv_heads * shape.head_dim
    sizes = {
        "q": (queries, hidden),
        "k": (keys, hidden),
        "v": (keys, hidden),
        "qkv": (queries + 2 * keys, hidden),
        "o": (hidden, queries),
        "gate": (block.neurons, hidden),
        "up": (block.neurons, hidden),
        "gate_up": (2 * block.neurons, hidden),
        "down": (hidden, block.neurons),
    }
    for short, path in family.projections.items():
        if not (block.query_heads if short in _OF_ATTENTION else block.neurons):
            continue
        found[f"{path}.weight"] = sizes[short]
        if short in shape.biases:
            found[f"{path}.bias"] = sizes[short][:1]
    if block.query_heads:
        found |= {f"{name}.weight": (shape.head_dim,) for name in family.head_norms}
        found |= {f"{name}.weight": (hidden,) for name in family.attention_norms}
    if block.neurons:
        found |= {f"{name}.weight": (hidden,) for name in family.mlp_norms}
    return found


def slices(shape: ModelShape, keep: tuple[BlockKeep, ...]) -> dict[str, Slice]:
    """Return, for each tensor that keeping `keep` of `shape` leaves, the part of the base that it is.

    Names are those of the result (blocks renumbered from 0). The query heads of KV group g are rows
    [g r d, (g + 1) r d) of q and columns of o, r queries a group: the order of transformers' `repeat_kv`. Where fewer
    queries stay in every group, those that stay are still in that order.
    """
    family = lookup(shape.family)
    entry = _entry_norms(family, shape)
    outside = [name for name in tensors(shape) if name in entry or not name.startswith(f"{family.blocks}.")]
    found = {name: Slice(name) for name in outside}
    for index, one in enumerate(keep):
        block = shape.blocks[one.index]
        axes = _kept_axes(shape, block, one)
        left = BlockShape(*(len(kept(one, block)) for kept in (kept_queries, kept_groups, kept_neurons)))
        for name in _block_tensors(family, shape, left):
            rows, columns = axes_of(family, name, axes)
            found[f"{family.blocks}.{index}.{name}"] = Slice(f"{family.blocks}.{one.index}.{name}", rows, columns)
    return found


def _kept_axes(shape: ModelShape, block: BlockShape, keep: BlockKeep) -> Axes:
    """Return the kept positions along the axes of a block; None where all are kept."""
    uncut = keep.kv_groups is None and keep.queries is UNSET
    queries = None if uncut else _expand(kept_queries(keep, block), shape.head_dim)
    keys = None if keep.kv_groups is None else _expand(kept_groups(keep, block), shape.head_dim)
    return block_axes(shape, block, queries, keys, None if keep.neurons is None else kept_neurons(keep, block))


def block_axes(
    shape: ModelShape,
    block: BlockShape,
    queries: tuple[int, ...] | None,
    keys: tuple[int, ...] | None,
    neurons: tuple[int, ...] | None,
) -> Axes:
    """Return positions in `block` along every axis that a projection has, fused ones included; None means all."""
    after_q, after_k = block.query_heads * shape.head_dim, block.kv_heads * shape.head_dim
    qkv = gate_up = None
    if queries is not None or keys is not None:
        of_q, of_k = range(after_q) if queries is None else queries, range(after_k) if keys is None else keys
        qkv = (*of_q, *(after_q + key for key in of_k), *(after_q + after_k + key for key in of_k))
    if neurons is not None:
        gate_up = (*neurons, *(block.neurons + neuron for neuron in neurons))
    return {"queries": queries, "keys": keys, "qkv": qkv, "neurons": neurons, "gate_up": gate_up}


def _expand(heads: tuple[int, ...], size: int) -> tuple[int, ...]:
    return tuple(head * size + offset for head in heads for offset in range(size))


# Which axis of the block each projection's rows (outputs) and columns (inputs) run along; None: the hidden size.
_AXES: dict[str, tuple[str | None, str | None]] = {
    "q": ("queries", None),
    "k": ("keys", None),
    "v": ("keys", None),
    "qkv": ("qkv", None),
    "o": (None, "queries"),
    "gate": ("neurons", None),
    "up": ("neurons", None),
    "gate_up": ("gate_up", None),
    "down": (None, "neurons"),
}


def axes_of(family: Family, name: str, axes: Axes) -> tuple[tuple[int, ...] | None, tuple[int, ...] | None]:
    """Return which of `axes` the rows and columns of a block's tensor run along; None for any other axis."""
    for short, path in family.projections.items():
        if name.startswith(f"{path}."):
            rows, columns = (axes[axis] if axis else None for axis in _AXES[short])
            return rows, (columns if name.endswith(".weight") else None)
    return None, None
