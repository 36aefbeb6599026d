"""Exact zero-padding: a larger shape that computes the same, and where each tensor of it comes from. Pure.

A neuron whose gate, up and down weights are zero adds act(0) * 0 = 0; a query head whose q rows and o columns are zero
adds nothing either, whatever its keys and values are. A removed module comes back as zeros, its norms included. So
the function stays the same, and only parameters and KV cache grow.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import msgspec

from shortllama import configs, layout
from shortllama.errors import UnsupportedError
from shortllama.families import lookup
from shortllama.shape import BlockShape, ModelShape


class Placed(NamedTuple):
    """A tensor of the result: its dimensions, the source tensor, and the rows and columns that the source fills.

    `source` None is all zeros; `rows` and `columns` None mean every one of them, in order.
    """

    dimensions: layout.Dimensions
    source: str | None
    rows: tuple[int, ...] | None = None
    columns: tuple[int, ...] | None = None


def uniform(shape: ModelShape, config: configs.Config) -> tuple[ModelShape, configs.Config]:
    """Return the smallest uniform shape that holds `shape` and that a stock class loads, with that class's config.

    `config` is the base's, with as many blocks as `shape`. Every size is the largest of its kind over the blocks.
    Raises UnsupportedError where no stock class has such a shape.
    """
    block = BlockShape(*_largest_heads(shape), max((1, *(one.neurons for one in shape.blocks))))
    for biases in _bias_sets(shape):
        wanted = msgspec.structs.replace(shape, blocks=(block,) * len(shape.blocks), biases=biases)
        found = configs.stock_config(config, wanted)
        if found is not None:
            return wanted, found
    raise UnsupportedError(
        f"no stock class loads a {shape.family} model of {block.query_heads} query heads of {shape.head_dim} with "
        f"biases {', '.join(shape.biases) or 'none'} at hidden size {shape.hidden}; keep its own form"
    )


def _largest_heads(shape: ModelShape) -> tuple[int, int]:
    attentions = [one for one in shape.blocks if one.kv_heads] or [BlockShape(1, 1, 0)]
    groups = max(one.kv_heads for one in attentions)
    return groups * max(one.query_heads // one.kv_heads for one in attentions), groups


def _bias_sets(shape: ModelShape) -> Iterator[tuple[str, ...]]:
    """Yield the shape's biases, then with those that stock classes can only have together with them."""
    yield shape.biases
    for groups in (lookup(shape.family).bias_switches.values(), *configs.FOREIGN_BIASES.values()):
        found = dict.fromkeys(shape.biases)
        for names in groups:
            found |= dict.fromkeys(names if set(names) & set(found) else ())
        yield tuple(found)


def placements(shape: ModelShape, after: ModelShape) -> dict[str, Placed]:
    """Return, for each tensor of `after` by name, what of a model of `shape` it holds; the rest is zero.

    `after` has as many blocks, and no size smaller than `shape`'s.
    """
    family = lookup(shape.family)
    held = layout.tensors(shape)
    found: dict[str, Placed] = {}
    for name, dimensions in layout.tensors(after).items():
        if name not in held:
            found[name] = Placed(dimensions, None)
        elif held[name] == dimensions:
            found[name] = Placed(dimensions, name)
        else:
            index = int(name.removeprefix(f"{family.blocks}.").split(".", 1)[0])
            axes = _axes(shape, shape.blocks[index], after.blocks[index])
            rows, columns = layout.axes_of(family, name.removeprefix(f"{family.blocks}.{index}."), axes)
            found[name] = Placed(dimensions, name, rows, columns)
    return found


def _axes(shape: ModelShape, block: BlockShape, after: BlockShape) -> layout.Axes:
    """Return where a block's queries, keys and neurons lie along those axes of the padded block.

    A padded group has its own queries first, so that every query head still reads its own KV head.
    """
    size, groups = shape.head_dim, range(block.kv_heads)
    per_group = size * (block.query_heads // block.kv_heads) if block.kv_heads else 0
    after_group = size * (after.query_heads // after.kv_heads) if after.kv_heads else 0
    queries = tuple(group * after_group + offset for group in groups for offset in range(per_group))
    return layout.block_axes(shape, after, queries, tuple(range(block.kv_heads * size)), tuple(range(block.neurons)))
