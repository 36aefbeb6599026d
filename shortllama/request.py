"""What a plan is asked for, checked: a method, a shape, a target, and scores that fit all three. Pure.

Options are named in errors as the command line spells them, because that is where their values come from.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from shortllama import methods, selection
from shortllama.errors import InputError, PlanError, UnsupportedError
from shortllama.methods import Method
from shortllama.plans import Target
from shortllama.removals import Unit
from shortllama.scores import Scores, check_finite
from shortllama.shape import ModelShape
from shortllama.variants import AXES, Variant, axis_of


class Request(msgspec.Struct, frozen=True):
    """All that decides a plan; see `planning.make_plan_for`. `unit` None: the method's own."""

    method: Method
    shape: ModelShape
    target: Target
    scores: Scores | None
    protect: tuple[int, int]
    align: int
    at_most: bool
    unit: Unit | None = None
    iterative: bool = False
    variant: Variant = Variant()

    @property
    def depth_unit(self) -> Unit:
        """What a method that removes whole parts removes."""
        return self.unit or "block"

    @property
    def compensation(self) -> str | None:
        """The bias compensation of the plan; a blind one has no means to make biases from."""
        return None if self.scores is None else self.method.compensation

    @property
    def scored_unit(self) -> str:
        """The unit that scores must have."""
        return self.unit or self.method.unit

    @property
    def unprotected(self) -> range:
        """The blocks that may be touched."""
        return selection.candidates(len(self.shape.blocks), self.protect)

    def describe_target(self) -> str:
        """Return the target as the command line spells it."""
        value = self.target.value
        return f"--{self.target.kind} {value if isinstance(value, str) else format(value, 'g')}"

    def describe_protection(self) -> str:
        """Return what must stay."""
        first, last = self.protect
        if first == last == 0:
            return f"one {self.depth_unit} must stay"
        return f"the first {first} and last {last} of {len(self.shape.blocks)} are protected (--protect {first},{last})"


def unit_of(method: Method, unit: Unit | None) -> Unit | None:
    """Return the unit asked for where it is not the method's own, else None. Raises InputError for one it lacks."""
    if unit in (None, method.unit):
        return None
    if method.unit == "width":
        raise InputError(f"--unit {unit} is not for {method.name}, which removes heads and neurons")
    if not method.modules:
        able = ", ".join(row.name for row in methods.METHODS.values() if row.modules)
        raise InputError(f"--unit {unit} is not for {method.name}, which scores whole blocks; use one of {able}")
    return unit


def variant(request: Request) -> str:
    """Return what a plan's method is called beside its name."""
    said = ["modules"] if request.depth_unit == "module" else []
    said += ["iterative"] if request.iterative else []
    said += request.variant.said()
    return f" ({', '.join(said)})" if said else ""


# -- checks -------------------------------------------------------------------------------------------------------


def check(request: Request) -> None:
    """Raise InputError for a target out of range, options that do not go together, or scores that do not fit."""
    blocks, (first, last) = len(request.shape.blocks), request.protect
    if min(first, last) < 0:
        raise InputError(f"--protect {first},{last}: counts of blocks must not be negative")
    if request.align < 1:
        raise InputError(f"--align {request.align}: give a positive multiple, for example 64")
    if request.align > 1 and request.method.unit == "block":
        raise InputError(f"--align is for width methods; {request.method.name} removes whole blocks")
    if not request.unprotected:
        raise PlanError(
            f"--protect {first},{last} leaves none of the {blocks} blocks to {request.method.name}; lower it"
        )
    request.variant.check(request.method.name, request.method.criterion)
    check_unit(request.shape, request.scored_unit)
    _check_axis(request)
    kind, value = request.target.kind, request.target.value
    blockwise = request.method.unit == "block" and request.depth_unit == "block"
    known = ("ratio", "blocks", "target-params") if blockwise else ("ratio", "target-params")
    if request.iterative and not request.method.iterative:
        raise InputError(
            f"--iterative is not for {request.method.name}: what it measures does not change as "
            f"{'blocks go' if request.method.choice == 'ranked' else 'one run goes'}"
        )
    if kind not in known:
        what = request.method.name + ("" if request.depth_unit == "block" else " by module")
        raise InputError(f"--{kind} is not for {what}; use {' or '.join(f'--{k}' for k in known)}")
    assert not isinstance(value, str), "these kinds hold numbers"
    if kind == "ratio" and not 0 < value < 1:
        raise InputError(f"--ratio {value:g} is outside (0, 1); give the share to remove, for example 0.25")
    if kind == "target-params" and not 0 < value < request.shape.parameters:
        raise InputError(f"--target-params {value:g} is not between 0 and the model's {request.shape.parameters}")
    if kind == "blocks" and not (value >= 1 and value == int(value)):
        raise InputError(f"--blocks {value:g}: give how many blocks to remove, 1 or more")
    if request.scores is not None:
        _check_scores(request, request.scores)


def check_unit(shape: ModelShape, unit: str) -> None:
    """Raise UnsupportedError for widths of a model whose blocks can only be removed whole."""
    if unit == "width" and shape.mixer:
        raise UnsupportedError(
            f"blocks of a {shape.family} model can only be removed whole, without heads or neurons to choose among; "
            "use a method for blocks such as ppl or bi"
        )


def _check_axis(request: Request) -> None:
    """Raise InputError where query heads should go from groups that have one each."""
    if axis_of(request.variant) == AXES[0]:
        return
    if all(request.shape.blocks[index].queries_per_group < 2 for index in request.unprotected):
        raise InputError(
            f"--axis {request.variant.axis}: every KV head of the blocks that may be touched is read by one query "
            f"head, so none can go alone; use --axis {AXES[0]}"
        )


def _check_scores(request: Request, scores: Scores) -> None:
    method, shape = request.method, request.shape
    if scores.criterion != method.criterion:
        raise InputError(
            f"scores are of criterion {scores.criterion!r}, method {method.name} needs {method.criterion!r}; "
            f"score again with --criterion {method.criterion}"
        )
    if scores.unit != request.scored_unit:
        raise InputError(f"scores are by {scores.unit}, method {method.name} needs them by {request.scored_unit}")
    if (scores.order is not None) != request.iterative:
        raise InputError(
            "these scores are iterative, add --iterative"
            if scores.order is not None
            else "--iterative needs scores that were made so; score again with --iterative"
        )
    lists = _lists(scores, request.scored_unit, shape, queries=axis_of(request.variant) != AXES[0])
    for name, (values, sizes) in lists.items():
        if values is None:
            raise InputError(f"scores lack {name!r}, which method {method.name}{variant(request)} needs; score again")
        if values != sizes:
            raise InputError(f"scores.{name} are for {_say(values)}, this model has {_say(sizes)}; score this model")
    if scores.base_digest != shape.digest():
        raise PlanError(
            f"scores are of another model (shape {scores.base_digest}, this one is {shape.digest()}); score this model"
        )
    recorded = (scores.details or {}).keys()
    lacking = sorted({"attention_deviation", "means"} - recorded) if method.compensation else []
    if lacking:
        raise InputError(f"scores lack details.{lacking[0]}, which method {method.name} needs; score again")
    for name, asked in request.variant.asked().items():
        found = (scores.details or {}).get(name, asked)
        if found != asked:
            option = f"--{name.replace('_', '-')}"
            raise InputError(f"these scores are of {option} {found}, not {asked}; score again, or leave {option} out")
    if method.choice == "run" and not _has_runs(scores, len(shape.blocks)):
        raise InputError(f"scores lack 'runs' of every length, which method {method.name} needs; score again")
    check_finite(scores)


def _has_runs(scores: Scores, blocks: int) -> bool:
    runs = scores.runs or {}
    return all(len(runs.get(str(length), ())) == blocks - length + 1 for length in range(1, blocks + 1))


def _lists(
    scores: Scores, unit: str, shape: ModelShape, *, queries: bool
) -> dict[str, tuple[tuple[int, ...] | None, tuple[int, ...]]]:
    """For each list the method reads: the number of scores in each block, and of units the model has there."""
    if unit == "block":
        return {"blocks": (_present(scores.blocks), (1,) * len(shape.blocks))}
    if unit == "module":
        return {
            "attention": (_present(scores.attention), tuple(int(block.kv_heads > 0) for block in shape.blocks)),
            "mlp": (_present(scores.mlp), tuple(int(block.neurons > 0) for block in shape.blocks)),
        }
    heads = scores.query_heads or None
    inside = {"query_heads": (_lengths(heads), tuple(block.query_heads for block in shape.blocks))} if queries else {}
    return {
        "kv_groups": (_lengths(scores.kv_groups), tuple(block.kv_heads for block in shape.blocks)),
        "neurons": (_lengths(scores.neurons), tuple(block.neurons for block in shape.blocks)),
        **inside,
    }


def _present(values: Sequence[float | None] | None) -> tuple[int, ...] | None:
    """1 for each block with a score, 0 for each without."""
    return None if values is None else tuple(int(value is not None) for value in values)


def _lengths(lists: tuple[tuple[float, ...], ...] | None) -> tuple[int, ...] | None:
    return None if lists is None else tuple(map(len, lists))


def _say(sizes: Sequence[int]) -> str:
    different = sorted(set(sizes))
    units = "" if different == [1] else f" of {'/'.join(map(str, different))} units"
    return f"{len(sizes)} blocks{units}"
