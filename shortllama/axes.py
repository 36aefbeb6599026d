"""The two axes along which attentions shrink: whole KV groups go, or query heads of every group. Pure.

A unit of the axis "kv-groups" is a KV head with the query heads that read it. Configs know one number of query heads
for all groups, so a unit of "queries-per-group" is one query head of every group of a block: the lowest of each first,
then the next. KV heads and their cache stay whole there, and so does the best query head of each group.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from shortllama.scores import Scores
from shortllama.shape import BlockShape
from shortllama.variants import AXES, Variant, axis_of

# What goes along each axis.
NOUNS: dict[str, str] = dict(zip(AXES, ("KV group", "query head"), strict=True))


class Units(NamedTuple):
    """The units of one block's attention: how many there are, and the query and KV heads that go with each."""

    count: int
    query_heads: int
    kv_heads: int

    @property
    def least(self) -> int:
        """How many stay whatever the scores say."""
        return 0 if self.kv_heads else min(1, self.count)

    def values(self, head_dim: int) -> int:
        """Return the parameters, per hidden unit, that go with one: rows of q, k and v, columns of o."""
        return 2 * (self.query_heads + self.kv_heads) * head_dim

    def columns(self, head_dim: int) -> int:
        """Return how much narrower one makes the narrowest projection that it is part of."""
        return (self.kv_heads or self.query_heads) * head_dim

    def left(self, block: BlockShape, units: int, neurons: int) -> BlockShape:
        """Return what is left of the block when this many units and neurons stay."""
        gone = self.count - units
        return BlockShape(block.query_heads - gone * self.query_heads, block.kv_heads - gone * self.kv_heads, neurons)


def units(variant: Variant, block: BlockShape) -> Units:
    """Return the units of a block along the axis of `variant`."""
    if axis_of(variant) == "kv-groups":
        return Units(block.kv_heads, block.queries_per_group, 1)
    return Units(block.queries_per_group, block.kv_heads, 0)


def sums(variant: Variant, scores: Scores, index: int, block: BlockShape) -> Sequence[float]:
    """Return what a criterion sums up to over each unit of block `index`; empty where there are no scores of it."""
    if axis_of(variant) == "kv-groups":
        return scores.kv_groups[index] if scores.kv_groups else ()
    values, size = scores.query_heads[index] if scores.query_heads else (), block.queries_per_group
    ranked = [sorted(values[group * size : (group + 1) * size]) for group in range(block.kv_heads)]
    return [sum(rank) for rank in zip(*ranked, strict=True)]
