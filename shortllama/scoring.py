"""Run a criterion on a model: check, measure, and return Scores with their cost. The only way a criterion is called.

The model comes back exactly as it was. Knows no method, no target count and no plan.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import msgspec
from torch import Tensor

from shortllama import costs, criteria, families, removals, stack, surgery, texts
from shortllama.calibration import Calibration
from shortllama.criteria import memory
from shortllama.errors import InputError
from shortllama.journal import Journal
from shortllama.plans import shape_after
from shortllama.removals import Goal, Piece
from shortllama.request import check_unit
from shortllama.scores import Cost, Scores, check_finite
from shortllama.shape import ModelShape
from shortllama.variants import Variant

Progress = Callable[[int, int], None]
Note = Callable[[str], None]

# Progress of a run of several steps is told in these parts of a step.
_FINE = 1000
_UNESTIMATED = "what blocks hold is known of attention with a gated FFN only"


def score(
    model: Any,
    criterion: str,
    calibration: Calibration | None = None,
    *,
    unit: criteria.Unit | None = None,
    towards: ModelShape | None = None,
    variant: Variant | None = None,
    seed: int = 0,
    reductions: criteria.Reductions | None = None,
    progress: Progress | None = None,
    journal: Journal | None = None,
) -> Scores:
    """Return the scores of `criterion` on a transformers model; higher = keep.

    `calibration` is needed by all but mag, mag-sp, random and last, which ignore it. `unit`: "module" scores attention
    and FFNs apart, None is the criterion's own. `towards`: the shape that the model will be pruned to; wanda-sp feeds
    the outputs of blocks pruned to it on, and dense outputs without it. `reductions`: how mag and taylor aggregate
    weights, by default the published sums. `variant`: what flap or llm-pruner measures. `seed` is for random scores and
    bootstrap intervals. `progress(done, total)` is called as the work goes on. `journal` keeps what is finished: with
    it, a run of equal arguments that was killed goes on, and gives the same scores. Equal arguments give equal scores
    on one machine; weights, flags and mode of `model` are left as they were.

    Raises InputError for an unknown criterion, missing calibration, ids outside the vocabulary, a model without
    weights, and scores that are not finite or all equal; UnsupportedError for an unknown family.
    """
    how: dict[str, Any] = {"unit": unit, "towards": towards, "variant": variant, "reductions": reductions}
    journals = {} if journal is None else {criterion: journal}
    return score_all(model, (criterion,), calibration, **how, seed=seed, progress=progress, journals=journals)[
        criterion
    ]


def score_all(
    model: Any,
    names: Sequence[str],
    calibration: Calibration | None = None,
    *,
    unit: criteria.Unit | None = None,
    towards: ModelShape | None = None,
    variant: Variant | None = None,
    seed: int = 0,
    reductions: criteria.Reductions | None = None,
    progress: Progress | None = None,
    journals: Mapping[str, Journal] | None = None,
    note: Note | None = None,
) -> dict[str, Scores]:
    """Return the scores of several criteria by their names; those of `criteria.TRACED` cost one pass together.

    The other arguments are as in `score`; they hold for every criterion, and are checked for all of them before any is
    measured. `journals`: by the names of those that have one. `note` is told how much memory each group of criteria
    needs before it is measured.
    """
    how: dict[str, Any] = {"unit": unit, "seed": seed, "reductions": reductions, "progress": None, "variant": variant}
    prepared = {name: _prepare(model, name, calibration, iterative=False, **how) for name in names}
    traced = tuple(name for name in prepared if name in criteria.TRACED)
    alone = [(name,) for name in prepared if name not in traced]
    groups = ([traced] if traced else []) + alone
    found: dict[str, Scores] = {}
    for number, group in enumerate(groups):
        members = [prepared[name][0] for name in group]
        task = dataclasses.replace(
            prepared[group[0]][1],
            towards=towards,
            progress=_part_of(progress or _silent, number, len(groups)),
            journal=(journals or {}).get(group[0], Journal()),
        )
        with stack.quiet(model), _metered(task, group, note) as cost:
            measured = _measure(members, task)
            spent = cost()
        for name, chosen, one in zip(group, members, measured, strict=True):
            found[name] = _scores(chosen, task, one, spent)
    return {name: found[name] for name in prepared}


def _measure(chosen: Sequence[criteria.Criterion], task: criteria.Task) -> list[criteria.Measured]:
    if len(chosen) == 1:
        return [chosen[0].score(task)]
    from shortllama.criteria import trace

    return trace.score_together(task, chosen)


@contextmanager
def _metered(
    task: criteria.Task, names: tuple[str, ...], note: Note | None, *, iterative: bool = False
) -> Generator[Callable[[], Cost]]:
    """Tell what memory the work needs. Yield what returns the cost so far; the journal keeps it with values."""
    tokens, shared = _tokens(task), names if len(names) > 1 else ()
    needed = _needed(task, names, iterative=iterative)
    if note is not None and needed is not None and not next(task.adapter.model.parameters()).is_meta:
        note(f"{', '.join(names)} {needed.said()}")
    started = costs.start(next(task.adapter.model.parameters()).device)
    with stack.counted(list(task.adapter.blocks)) as passed:

        def cost() -> Cost:
            passes = round(passed() / tokens, 3) if tokens else 0.0
            counted = msgspec.structs.replace(started(), tokens=tokens, block_passes=passes, shared=shared)
            if needed is None:
                return msgspec.structs.replace(counted, reasons={**counted.reasons, "estimated_bytes": _UNESTIMATED})
            return msgspec.structs.replace(counted, estimated_bytes=needed.beyond)

        yield task.journal.metered(cost)


def _needed(task: criteria.Task, names: Sequence[str], *, iterative: bool) -> memory.Need | None:
    """Return what the criterion among several in one pass needs that needs most; None where it is not known."""
    lengths = [len(ids) for ids in task.calibration.sequences] if task.calibration else []
    how: dict[str, Any] = {"dtype": task.dtype, "variant": task.variant, "iterative": iterative}
    needs = [memory.need(task.shape, name, lengths, **how) for name in names]
    return max((one for one in needs if one is not None), key=lambda one: one.beyond, default=None)


def iterate(
    model: Any,
    criterion: str,
    calibration: Calibration | None = None,
    *,
    goal: Goal,
    protect: tuple[int, int] = (0, 0),
    unit: criteria.Unit | None = None,
    seed: int = 0,
    reductions: criteria.Reductions | None = None,
    progress: Progress | None = None,
    journal: Journal | None = None,
    note: Note | None = None,
) -> Scores:
    """Return scores whose `order` holds what goes first, second, ... when what is left is scored again each time.

    Greedy (Shortened LLaMA sec. 5 without retraining, SLEB): each step scores the model without what is gone, and
    removes the unprotected piece that ranks lowest there (`removals.ranking`), until `goal` is settled or one piece is
    left. Nothing is copied: what is gone is made transparent, so a step of ppl or kl on a blocks costs a (a + 1) / 2
    block passes. KL is to the dense model throughout. The lists are those of the first step; `details["steps"]` has
    the score at which each piece went. Arguments and errors otherwise as in `score`.
    """
    chosen, task = _prepare(model, criterion, calibration, unit, seed, reductions, progress, iterative=True)
    assert task.unit != "width", "width methods are not iterative here"
    free = removals.pieces(task.shape, task.unit, protect)
    task = dataclasses.replace(task, journal=journal or Journal())
    limit = goal.steps([goal.size(task.shape, piece) for piece in free])
    steps: list[tuple[Piece, float]] = []
    first: Scores | None = None
    kept: dict[int, Tensor] = {}
    with stack.quiet(model), _metered(task, (criterion,), note, iterative=True) as cost:
        while not _settled(task, goal, free, [piece for piece, _ in steps]):
            gone = [piece for piece, _ in steps]
            part = task.journal.part(f"step {len(steps)}")
            # The first step is gone through again from its own values: the result has its lists, kl its dense states.
            finished = part.finished("removed") if first else None
            if finished is not None:
                steps.append((removals.parse(finished[0]), finished[1]))
                continue
            now = _without(task, gone, kept, _part_of(task.progress, len(steps), limit), part)
            with _left_out(task, gone):
                scores = _scores(chosen, now, chosen.score(now))
            first = first or scores
            steps.append(_lowest(scores, now, [piece for piece in free if piece not in gone]))
            part.keep("removed", [str(steps[-1][0]), steps[-1][1]])
        spent = cost()
    if first is None:
        raise InputError("nothing may go: the target removes nothing, or protection leaves one block; ask for more")
    record = [{"removed": str(piece), "score": value} for piece, value in steps]
    return msgspec.structs.replace(
        first,
        order=tuple(str(piece) for piece, _ in steps),
        details={**(first.details or {}), "steps": record},
        cost=msgspec.structs.replace(spent, tokens=spent.tokens * len(steps)),
    )


def _prepare(
    model: Any,
    criterion: str,
    calibration: Calibration | None,
    unit: criteria.Unit | None,
    seed: int,
    reductions: criteria.Reductions | None,
    progress: Progress | None,
    *,
    iterative: bool,
    variant: Variant | None = None,
) -> tuple[criteria.Criterion, criteria.Task]:
    """Check everything that can be checked before any work."""
    chosen = criteria.lookup(criterion)
    how = reductions or criteria.Reductions()
    criteria.check(chosen, unit, how, iterative=iterative)
    chosen_variant = variant or Variant()
    chosen_variant.check_measured(chosen.NAME)
    adapter = families.adapter(model)
    shape = surgery.shape_of(model)
    check_unit(shape, unit or chosen.UNITS[0])
    used = _checked(chosen, criteria.needs(chosen, variant), calibration, shape, model)
    task = criteria.Task(adapter, shape, used, seed, None, progress or _silent, how, unit or chosen.UNITS[0])
    task = dataclasses.replace(task, variant=chosen_variant)
    return chosen, task


def _tokens(task: criteria.Task) -> int:
    return task.calibration.tokens if task.calibration else 0


def _scores(
    chosen: criteria.Criterion, task: criteria.Task, found: criteria.Measured, cost: Cost | None = None
) -> Scores:
    scores = Scores(
        criterion=chosen.NAME,
        unit=task.unit,
        base_digest=task.shape.digest(),
        blocks=found.blocks,
        attention=found.attention,
        mlp=found.mlp,
        kv_groups=found.kv_groups,
        neurons=found.neurons,
        query_heads=_query_heads(task.shape, found),
        runs=found.runs,
        calibration=task.calibration.description if task.calibration else None,
        details=found.details,
        cost=cost,
    )
    check_finite(scores)
    return scores


def _query_heads(shape: ModelShape, found: criteria.Measured) -> Any:
    """Return the scores of query heads where they say more than those of KV groups; where no head is shared, unset."""
    shared = any(block.queries_per_group > 1 for block in shape.blocks)
    return found.query_heads if shared and found.query_heads is not None else msgspec.UNSET


# -- iterative runs: pieces are named by their blocks in the whole model, scores by their positions in what is left ----


def _settled(task: criteria.Task, goal: Goal, free: Sequence[Piece], gone: Sequence[Piece]) -> bool:
    """Whether no further removal needs to be ranked; the last piece of the model never goes."""
    assert task.unit != "width"
    left = [goal.size(task.shape, piece) for piece in free if piece not in gone]
    if not left or len(gone) + 1 >= len(removals.pieces(task.shape, task.unit)):
        return True
    return goal.settled(sum(goal.size(task.shape, piece) for piece in gone), min(left))


def _without(
    task: criteria.Task, gone: Sequence[Piece], kept: dict[int, Tensor], progress: Progress, journal: Journal
) -> criteria.Task:
    """Return the task of scoring what is left."""
    keep = removals.keep_after(task.shape, gone)
    members = tuple(one.index for one in keep)
    left = shape_after(task.shape, keep)
    return dataclasses.replace(task, shape=left, members=members, kept=kept, progress=progress, journal=journal)


@contextmanager
def _left_out(task: criteria.Task, gone: Sequence[Piece]) -> Generator[None]:
    """Make what is gone transparent: blocks as a whole where nothing of them is left."""
    members = {keep.index for keep in removals.keep_after(task.shape, gone)}
    parts = {piece if piece.block in members else Piece(piece.block) for piece in gone}
    with ExitStack() as restore:
        for block, part in parts:
            restore.enter_context(stack.left_out(task.adapter, task.adapter.blocks[block], part))
        yield


def _lowest(scores: Scores, now: criteria.Task, free: Sequence[Piece]) -> tuple[Piece, float]:
    """Return the piece that goes next, by its name in the whole model, and its score."""
    assert now.members is not None
    position = {block: index for index, block in enumerate(now.members)}
    local = [Piece(position[block], part) for block, part in free]
    block, part = removals.ranking(scores, now.shape, local)[0]
    values = {"block": scores.blocks, "attention": scores.attention, "mlp": scores.mlp}[part]
    value = None if values is None else values[block]
    assert value is not None, "what was ranked has a score"
    return Piece(now.members[block], part), value


def _part_of(progress: Progress, step: int, steps: int) -> Progress:
    """Return a progress function for one step of several."""
    if steps == 1:
        return progress
    return lambda done, total: progress(step * _FINE + done * _FINE // total, steps * _FINE)


def _silent(done: int, total: int) -> None:
    pass


def _checked(
    chosen: criteria.Criterion, needs: str, calibration: Calibration | None, shape: ModelShape, model: Any
) -> Calibration | None:
    """Return the calibration if the criterion reads it, None otherwise, after checking what it needs."""
    if needs != "nothing" and any(parameter.is_meta for parameter in model.parameters()):
        raise InputError(f"criterion {chosen.NAME} reads weights, and this model is a shape without any; load weights")
    if needs != "calibration":
        return None
    if calibration is None:
        raise InputError(f"criterion {chosen.NAME} needs calibration; give a text file, ids:FILE.jsonl or 'self'")
    name = str(calibration.description["source"])
    texts.check_vocabulary(calibration.sequences, shape.vocabulary, name)
    return calibration
