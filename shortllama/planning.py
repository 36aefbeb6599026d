"""From a method, a target and scores to a plan. Pure: every decision here is instant and exactly testable.

Without scores the plan is blind: the right shape, with an arbitrary choice of units. Options are named in errors as
the command line spells them, because that is where their values come from.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import msgspec

from shortllama import methods, selection
from shortllama.errors import InputError, PlanError
from shortllama.methods import Method
from shortllama.plan import BlockKeep, Plan, Provenance, Target, block_keep, make_plan, shape_after
from shortllama.scores import Scores, check_finite
from shortllama.shape import BlockShape, ModelShape


class _Request(msgspec.Struct, frozen=True):
    method: Method
    shape: ModelShape
    target: Target
    scores: Scores | None
    protect: tuple[int, int]
    align: int
    at_most: bool

    @property
    def unprotected(self) -> range:
        return selection.candidates(len(self.shape.blocks), self.protect)

    def describe_protection(self) -> str:
        first, last = self.protect
        if first == last == 0:
            return "one block must stay"
        return f"the first {first} and last {last} of {len(self.shape.blocks)} are protected (--protect {first},{last})"


def make_plan_for(
    method: str,
    *,
    model: str,
    shape: ModelShape,
    target: Target,
    scores: Scores | None = None,
    protect: tuple[int, int] | None = None,
    align: int = 1,
    at_most: bool = False,
    seed: int | None = None,
) -> Plan:
    """Return the plan that `method` makes for `shape` at `target`; a blind one where there are no `scores`.

    Target kinds: "ratio" (in (0, 1): of blocks, or of the KV groups and neurons of each unprotected block), "blocks"
    (how many go), "target-params" (parameters of the result; it may exceed them by less than one step, with `at_most`
    it stays at or below them). `protect` overrides the method's (first, last) blocks left whole. `align` rounds kept
    widths up to multiples of it. `seed` is only recorded.
    Raises InputError for a target out of range or scores of another criterion or model.
    """
    row = methods.lookup(method)
    chosen = row.protect if protect is None else protect
    request = _Request(row, shape, target, scores, chosen, align, at_most)
    _check(request)
    keep = _keep_blocks(request) if row.unit == "block" else _keep_widths(request)
    return make_plan(
        model=model,
        shape=shape,
        method=row.name,
        target=target,
        keep=keep,
        blind=scores is None,
        provenance=_provenance(scores, seed),
    )


def remark(plan: Plan, shape: ModelShape) -> str | None:
    """Return a sentence for the user where the result has more parameters than --target-params asked, else None."""
    if plan.target.kind != "target-params":
        return None
    above = shape_after(shape, plan.keep).parameters - float(plan.target.value)
    if above <= 0:
        return None
    return f"the result has {above:,.0f} parameters more than asked, less than one step; --at-most rounds the other way"


def _provenance(scores: Scores | None, seed: int | None) -> Provenance:
    if scores is None:
        return Provenance()
    digest = (scores.calibration or {}).get("digest")
    return Provenance(scores.digest(), None if digest is None else str(digest), seed)


# -- checks -------------------------------------------------------------------------------------------------------


def _check(request: _Request) -> None:
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
    kind, value = request.target.kind, request.target.value
    known = {"block": ("ratio", "blocks", "target-params"), "width": ("ratio", "target-params")}[request.method.unit]
    if kind not in known:
        raise InputError(f"--{kind} is not for {request.method.name}; use {' or '.join(f'--{k}' for k in known)}")
    assert not isinstance(value, str), "these kinds hold numbers"
    if kind == "ratio" and not 0 < value < 1:
        raise InputError(f"--ratio {value:g} is outside (0, 1); give the share to remove, for example 0.25")
    if kind == "target-params" and not 0 < value < request.shape.parameters:
        raise InputError(f"--target-params {value:g} is not between 0 and the model's {request.shape.parameters}")
    if kind == "blocks" and not (value >= 1 and value == int(value)):
        raise InputError(f"--blocks {value:g}: give how many blocks to remove, 1 or more")
    if request.scores is not None:
        _check_scores(request.scores, request.method, request.shape)


def _check_scores(scores: Scores, method: Method, shape: ModelShape) -> None:
    if scores.criterion != method.criterion:
        raise InputError(
            f"scores are of criterion {scores.criterion!r}, method {method.name} needs {method.criterion!r}; "
            f"score again with --criterion {method.criterion}"
        )
    if scores.unit != method.unit:
        raise InputError(f"scores are by {scores.unit}, method {method.name} needs them by {method.unit}")
    lists = _lists(scores, method, shape)
    for name, (values, sizes) in lists.items():
        if values is None:
            raise InputError(f"scores lack {name!r}, which method {method.name} needs; score again")
        if values != sizes:
            raise InputError(f"scores.{name} are for {_say(values)}, this model has {_say(sizes)}; score this model")
    if scores.base_digest != shape.digest():
        raise PlanError(
            f"scores are of another model (shape {scores.base_digest}, this one is {shape.digest()}); score this model"
        )
    check_finite(scores)


def _lists(
    scores: Scores, method: Method, shape: ModelShape
) -> dict[str, tuple[tuple[int, ...] | None, tuple[int, ...]]]:
    """For each list the method reads: the number of scores in each block, and of units the model has there."""
    if method.unit == "block":
        given = None if scores.blocks is None else (1,) * len(scores.blocks)
        return {"blocks": (given, (1,) * len(shape.blocks))}
    return {
        "kv_groups": (_lengths(scores.kv_groups), tuple(block.kv_heads for block in shape.blocks)),
        "neurons": (_lengths(scores.neurons), tuple(block.neurons for block in shape.blocks)),
    }


def _lengths(lists: tuple[tuple[float, ...], ...] | None) -> tuple[int, ...] | None:
    return None if lists is None else tuple(map(len, lists))


def _say(sizes: Sequence[int]) -> str:
    different = sorted(set(sizes))
    units = "" if different == [1] else f" of {'/'.join(map(str, different))} units"
    return f"{len(sizes)} blocks{units}"


# -- depth --------------------------------------------------------------------------------------------------------


def _keep_blocks(request: _Request) -> tuple[BlockKeep, ...]:
    blocks = request.shape.blocks
    # A blind plan drops the last blocks that may go.
    scores = tuple(-float(i) for i in range(len(blocks))) if request.scores is None else request.scores.blocks
    assert scores is not None
    order = selection.removal_order(scores, request.protect)
    count = _block_count(request, order)
    removable = min(len(order), len(blocks) - 1)
    if count > removable:
        raise PlanError(
            f"--{request.target.kind} {request.target.value:g}: {count} of {len(blocks)} blocks would go, but only "
            f"{removable} may: {request.describe_protection()}; ask for less"
        )
    if count == 0:
        raise InputError(
            f"--{request.target.kind} {request.target.value:g} removes no block of {len(blocks)}; try --blocks 1"
        )
    gone = set(order[:count])
    return tuple(BlockKeep(index) for index in range(len(blocks)) if index not in gone)


def _block_count(request: _Request, order: Sequence[int]) -> int:
    value = float(request.target.value)
    if request.target.kind == "ratio":
        return request.method.removes(len(request.shape.blocks), value)
    if request.target.kind == "blocks":
        return int(value)
    # Protected blocks come last, so that asking too much is refused with the number of blocks it would take.
    protected = [index for index in range(len(request.shape.blocks)) if index not in request.unprotected]
    sizes = [request.shape.block_parameters(request.shape.blocks[index]) for index in (*order, *protected)]
    excess = request.shape.parameters - math.floor(value)
    return selection.count_for(sizes, excess, at_most=request.at_most)


# -- width --------------------------------------------------------------------------------------------------------


def _keep_widths(request: _Request) -> tuple[BlockKeep, ...]:
    ratio = float(request.target.value) if request.target.kind == "ratio" else _ratio_for_parameters(request)
    widths = _widths(request, ratio)
    whole = [(block.kv_heads, block.neurons) for block in request.shape.blocks]
    if widths == whole:
        raise InputError(
            f"--{request.target.kind} {request.target.value:g} removes no KV group and no neuron"
            f"{' once aligned' if request.align > 1 else ''}; ask for more"
        )
    scores = request.scores
    keep: list[BlockKeep] = []
    for index, (block, (groups, neurons)) in enumerate(zip(request.shape.blocks, widths, strict=True)):
        group_scores = scores.kv_groups[index] if scores and scores.kv_groups else None
        neuron_scores = scores.neurons[index] if scores and scores.neurons else None
        keep.append(
            block_keep(index, block, _choose(group_scores, groups), _choose(neuron_scores, neurons)),
        )
    return tuple(keep)


def _choose(scores: Sequence[float] | None, keep: int) -> tuple[int, ...]:
    """The best `keep` units; the first ones in a blind plan."""
    return tuple(range(keep)) if scores is None else selection.highest(scores, keep)


def _widths(request: _Request, ratio: float) -> list[tuple[int, int]]:
    """KV groups and neurons that each block keeps at `ratio`, aligned; protected blocks keep all."""
    # A multiple of `align` columns is a multiple of this many KV groups of head_dim columns.
    group_multiple = request.align // math.gcd(request.align, request.shape.head_dim)
    removes = request.method.removes
    widths: list[tuple[int, int]] = []
    for index, block in enumerate(request.shape.blocks):
        if index not in request.unprotected:
            widths.append((block.kv_heads, block.neurons))
            continue
        groups = block.kv_heads - removes(block.kv_heads, ratio)
        neurons = block.neurons - removes(block.neurons, ratio)
        widths.append(
            (
                selection.align_up(groups, block.kv_heads, group_multiple),
                selection.align_up(neurons, block.neurons, request.align),
            )
        )
    return widths


def _parameters(request: _Request, ratio: float) -> int:
    blocks: list[BlockShape] = []
    for block, (groups, neurons) in zip(request.shape.blocks, _widths(request, ratio), strict=True):
        per_group = block.query_heads // block.kv_heads if block.kv_heads else 0
        blocks.append(BlockShape(groups * per_group, groups, neurons))
    return msgspec.structs.replace(request.shape, blocks=tuple(blocks)).parameters


def _ratio_for_parameters(request: _Request) -> float:
    """The largest ratio that leaves no fewer parameters than asked; with at_most the smallest that leaves no more."""
    wanted = float(request.target.value)
    least = _parameters(request, 1 - 2**-52)
    if wanted < least:
        raise PlanError(
            f"--target-params {wanted:g} cannot be reached by {request.method.name}: at least {least} parameters "
            f"stay{'' if request.protect == (0, 0) else ', ' + request.describe_protection()}; ask for more"
        )
    if request.at_most:
        return selection.last_true(lambda ratio: _parameters(request, ratio) > wanted)[1]
    return selection.last_true(lambda ratio: ratio < 1 and _parameters(request, ratio) >= wanted)[0]
