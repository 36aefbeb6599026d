"""Which blocks, or which of their modules, a depth plan keeps: what scores lowest goes until the goal is met."""

from __future__ import annotations

import math
from itertools import pairwise

from shortllama import methods, removals, selection
from shortllama.errors import InputError, PlanError
from shortllama.plans import BlockKeep, Target
from shortllama.removals import Goal, Piece, Unit
from shortllama.request import Request
from shortllama.shape import ModelShape


def goal_for(
    method: str,
    *,
    shape: ModelShape,
    target: Target,
    unit: Unit | None = None,
    at_most: bool = False,
) -> Goal:
    """Return how much of `shape` must go for a target of `make_plan_for`, for methods that remove blocks or modules."""
    row = methods.lookup(method)
    value = float(target.value)
    if target.kind == "target-params":
        return Goal(shape.parameters - math.floor(value), "reach" if at_most else "floor", "parameters")
    if target.kind == "ratio" and unit == "module":
        total = sum(map(shape.block_parameters, shape.blocks))
        return Goal(selection.half_up(total, value), "nearest", "parameters")
    if target.kind == "ratio":
        return Goal(row.removes(len(shape.blocks), value), "floor", "count")
    return Goal(int(value), "floor", "count")


def keep_pieces(request: Request) -> tuple[BlockKeep, ...]:
    """Return what is left after the goal's count of pieces has gone, in the order of the scores."""
    wanted = goal_for(
        request.method.name,
        shape=request.shape,
        target=request.target,
        unit=request.depth_unit,
        at_most=request.at_most,
    )
    if request.method.choice == "run" and request.scores is not None:
        return _keep_around_run(request, wanted)
    everything = removals.pieces(request.shape, request.depth_unit)
    free = removals.pieces(request.shape, request.depth_unit, request.protect)
    order = _order(request, free)
    # What may not go comes last, so that asking too much is refused with the number of pieces it would take.
    rest = [piece for piece in everything if piece not in set(order)]
    count = wanted.count([wanted.size(request.shape, piece) for piece in (*order, *rest)])
    removable = min(len(free), len(everything) - 1)
    _check_count(request, count, removable, len(everything))
    if count > len(order):
        raise InputError(
            f"these iterative scores stop after {len(order)} removals, and {request.describe_target()} takes "
            f"{count}; score again for this target"
        )
    return removals.keep_after(request.shape, order[:count])


def _order(request: Request, free: tuple[Piece, ...]) -> tuple[Piece, ...]:
    """The pieces that may go, the first to go first. A blind plan drops the last ones."""
    if request.scores is None:
        return free[::-1]
    if request.scores.order is None:
        return removals.ranking(request.scores, request.shape, free)
    order = tuple(map(removals.parse, request.scores.order))
    protected = [piece for piece in order if piece not in free]
    if protected:
        raise InputError(
            f"these iterative scores remove {protected[0]}, which does not go here: "
            f"{request.describe_protection()}; score again with this protection"
        )
    return order


def _keep_around_run(request: Request, wanted: Goal) -> tuple[BlockKeep, ...]:
    """What is left without the contiguous run of blocks that scores lowest among those of its length."""
    assert request.scores is not None, "a blind plan drops the last blocks"
    runs = request.scores.runs or {}
    shape, free = request.shape, request.unprotected
    chosen: list[range] = [range(0)]
    for length in range(1, len(free) + 1):
        values = runs.get(str(length), ())
        start = selection.best_run(values, range(free.start, free.stop - length + 1))
        chosen.append(range(start, start + length))
    totals = [sum(wanted.size(shape, Piece(index)) for index in run) for run in chosen]
    protected = [wanted.size(shape, Piece(i)) for i in range(len(shape.blocks)) if i not in free]
    count = wanted.count([after - before for before, after in pairwise(totals)] + protected)
    _check_count(request, count, min(len(free), len(shape.blocks) - 1), len(shape.blocks))
    return removals.keep_after(shape, map(Piece, chosen[count]))


def _check_count(request: Request, count: int, removable: int, total: int) -> None:
    noun = "block" if request.depth_unit == "block" else "module"
    if count > removable:
        raise PlanError(
            f"{request.describe_target()}: {count} of {total} {noun}s would go, but only "
            f"{removable} may: {request.describe_protection()}; ask for less"
        )
    if count == 0:
        hint = "try --blocks 1" if noun == "block" else "ask for more"
        raise InputError(f"{request.describe_target()} removes no {noun} of {total}; {hint}")
