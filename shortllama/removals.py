"""What can go from a stack of blocks, in which order, and how much of it is enough: pure decisions over pieces.

A piece is a block, or its attention (MHA) or FFN with the norms in front of them. One vocabulary serves planning and
iterative scoring, so that what is scored step by step is what a plan would have taken. It must not know of models.

Modules differ in size, so they are ranked by damage per parameter (the greedy rule for a knapsack): the rise of the
score over the dense model's, divided by the module's parameters with its norms. The dense score is `details.dense`
where the criterion has one (ppl), else 0. Shortened LLaMA ranks modules too, but does not say by which rule.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple

import msgspec

from shortllama import selection
from shortllama.errors import InputError
from shortllama.plans import BlockKeep
from shortllama.scores import Scores
from shortllama.shape import ModelShape

Unit = Literal["block", "module"]
Part = Literal["block", "attention", "mlp"]


class Piece(NamedTuple):
    """A part of a block that can go. Its text is `7` for block 7, `7.attention` or `7.mlp` for a module of it."""

    block: int
    part: Part = "block"

    def __str__(self) -> str:
        return str(self.block) if self.part == "block" else f"{self.block}.{self.part}"


def parse(text: str) -> Piece:
    """Return the piece that `text` names. Raises InputError for anything else."""
    block, dot, part = text.partition(".")
    if block.isdecimal() and (part in ("attention", "mlp") if dot else True):
        return Piece(int(block), part or "block")  # type: ignore[arg-type]
    raise InputError(f"{text!r} names no block or module; write 7, 7.attention or 7.mlp")


def pieces(shape: ModelShape, unit: Unit, protect: tuple[int, int] = (0, 0)) -> tuple[Piece, ...]:
    """Return what may go, first block first: unprotected blocks, or the modules that they have."""
    free = selection.candidates(len(shape.blocks), protect)
    if unit == "block":
        return tuple(Piece(index) for index in free)
    found = []
    for index in free:
        found += [Piece(index, "attention")] if shape.blocks[index].kv_heads else []
        found += [Piece(index, "mlp")] if shape.blocks[index].neurons else []
    return tuple(found)


def parameters(shape: ModelShape, piece: Piece) -> int:
    """Return the parameters that go with a piece, its norms among them."""
    block = shape.blocks[piece.block]
    sizes = {"block": shape.block_parameters, "attention": shape.attention_parameters, "mlp": shape.mlp_parameters}
    return sizes[piece.part](block)


def ranking(scores: Scores, shape: ModelShape, among: Iterable[Piece]) -> tuple[Piece, ...]:
    """Return the pieces, the first to go first: by score, or by rise of the score per parameter for modules.

    Ties fall to the earlier block, and to its attention.
    """
    return tuple(sorted(among, key=lambda piece: _key(scores, shape, piece, _value(scores, piece))))


def _value(scores: Scores, piece: Piece) -> float:
    values = {"block": scores.blocks, "attention": scores.attention, "mlp": scores.mlp}[piece.part]
    value = None if values is None else values[piece.block]
    assert value is not None, "scores of another unit or shape"
    return value


def _key(scores: Scores, shape: ModelShape, piece: Piece, value: float) -> float:
    """Return what a piece with this score is ranked by."""
    dense = float((scores.details or {}).get("dense") or 0.0)
    return value if piece.part == "block" else (value - dense) / parameters(shape, piece)


def doubt(scores: Scores, shape: ModelShape, keep: Sequence[BlockKeep], protect: tuple[int, int]) -> str | None:
    """Return a sentence where the cut falls inside a bootstrap interval: other text might have cut elsewhere.

    That is where the last piece to go and the first to stay cannot be told apart: the score of one lies within the 95 %
    interval of the other. None for scores without intervals (not ppl or kl, one sequence) and iterative ones.
    """
    intervals = (scores.details or {}).get("interval")
    if intervals is None or scores.order is not None or scores.unit == "width":
        return None
    free = ranking(scores, shape, pieces(shape, "block" if scores.unit == "block" else "module", protect))
    left = {one.index: one for one in keep}
    gone = [piece for piece in free if not _stays(left.get(piece.block), piece)]
    if not 0 < len(gone) < len(free):
        return None
    last, first = free[len(gone) - 1], free[len(gone)]

    def ends(piece: Piece) -> list[float]:
        listed = intervals if piece.part == "block" else intervals[piece.part]
        return [_key(scores, shape, piece, end) for end in listed[piece.block]]

    keys = {piece: _key(scores, shape, piece, _value(scores, piece)) for piece in (last, first)}
    if keys[first] > ends(last)[1] and keys[last] < ends(first)[0]:
        return None
    goes, stays = (f"{_value(scores, piece):.4g}" for piece in (last, first))
    sequences = len((scores.details or {}).get("sequence_tokens", ()))
    return (
        f"the cut falls inside a 95 % interval of {scores.criterion}: {last} goes at {goes}, {first} stays at {stays}, "
        f"and {sequences} sequences do not tell them apart; more --samples may"
    )


def _stays(keep: BlockKeep | None, piece: Piece) -> bool:
    if keep is None:
        return False
    return {"block": True, "attention": keep.kv_groups != "", "mlp": keep.neurons != ""}[piece.part]


def keep_after(shape: ModelShape, gone: Iterable[Piece]) -> tuple[BlockKeep, ...]:
    """Return what is left of `shape`; a block that has lost both modules goes as a whole."""
    lost = set(gone)
    keep: list[BlockKeep] = []
    for index, block in enumerate(shape.blocks):
        attention = block.kv_heads > 0 and Piece(index, "attention") not in lost
        mlp = block.neurons > 0 and Piece(index, "mlp") not in lost
        if Piece(index) in lost or not (attention or mlp):
            continue
        keep.append(
            BlockKeep(
                index,
                None if attention or not block.kv_heads else "",
                None if mlp or not block.neurons else "",
            )
        )
    return tuple(keep)


class Goal(msgspec.Struct, frozen=True):
    """How much must go: `excess` pieces or parameters, taken in order.

    Rules: "floor": as many as do not pass it; "reach": the fewest that reach it; "nearest": the number that comes
    nearest, the higher one halfway between.
    """

    excess: int
    rule: Literal["floor", "reach", "nearest"]
    by: Literal["count", "parameters"]

    def size(self, shape: ModelShape, piece: Piece) -> int:
        """Return what removing a piece counts."""
        return 1 if self.by == "count" else parameters(shape, piece)

    def count(self, sizes: Sequence[int]) -> int:
        """Return how many of `sizes`, taken in order, go."""
        if self.rule != "nearest":
            return selection.count_for(sizes, self.excess, at_most=self.rule == "reach")
        return selection.nearest_count(sizes, self.excess)

    def settled(self, removed: int, least: int) -> bool:
        """Return whether nothing more needs to be ranked: `removed` has gone, and what is left counts `least` or more.

        Where this is false, the next piece may still turn out to be one too many.
        """
        if self.rule == "floor":
            return removed + least > self.excess
        if self.rule == "reach":
            return removed >= self.excess
        return (removed + least) - self.excess > self.excess - removed

    def steps(self, sizes: Iterable[int]) -> int:
        """Return after how many removals it is settled at the latest, whatever their order."""
        removed = 0
        left = sorted(sizes)
        for step, size in enumerate(left):
            if self.settled(removed, size):
                return step
            removed += size
        return len(left)
