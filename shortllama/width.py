"""Which heads and neurons a width plan keeps: the best of each unprotected block."""

from __future__ import annotations

import math
from collections.abc import Sequence

import msgspec

from shortllama import axes, selection, width_rules
from shortllama.errors import InputError, PlanError
from shortllama.plans import COMPENSATED, BlockKeep, block_keep, with_biases
from shortllama.request import Request
from shortllama.scores import Scores
from shortllama.shape import BlockShape
from shortllama.variants import axis_of
from shortllama.width_rules import Rule


def keep_widths(request: Request) -> tuple[BlockKeep, ...]:
    """Return the blocks with the widths that the target leaves; one that loses all its units goes as a whole.

    Raises InputError where nothing would go, or where only scores tell the widths and there are none.
    """
    rule = width_rules.rule(request)
    ratio = _ratio_for_parameters(request, rule) if request.target.kind == "target-params" else request.target.value
    widths = _widths(request, rule, float(ratio))
    if widths == request.shape.blocks:
        head = axes.NOUNS[axis_of(request.variant)]
        raise InputError(
            f"--{request.target.kind} {request.target.value:g} removes no {head} and no neuron"
            f"{' once aligned' if request.align > 1 else ''}; ask for more"
        )
    scores = request.scores
    keep: list[BlockKeep] = []
    for index, (block, after) in enumerate(zip(request.shape.blocks, widths, strict=True)):
        if after.kv_heads == after.neurons == 0:
            continue
        group_scores = scores.kv_groups[index] if scores and scores.kv_groups else None
        neuron_scores = scores.neurons[index] if scores and scores.neurons else None
        groups, neurons = _choose(group_scores, after.kv_heads), _choose(neuron_scores, after.neurons)
        keep.append(block_keep(index, block, groups, neurons, _queries(scores, index, groups, block, after)))
    return tuple(keep)


def _queries(
    scores: Scores | None, index: int, groups: tuple[int, ...], block: BlockShape, after: BlockShape
) -> tuple[int, ...] | None:
    """The query heads that stay inside `groups`; None where all do."""
    if after.queries_per_group == block.queries_per_group:
        return None
    values = scores.query_heads[index] if scores and scores.query_heads else None
    return selection.heads_within(groups, block.queries_per_group, after.queries_per_group, values)


def _choose(scores: Sequence[float] | None, keep: int) -> tuple[int, ...]:
    """The best `keep` units; the first ones in a blind plan."""
    return tuple(range(keep)) if scores is None else selection.highest(scores, keep)


def _widths(request: Request, rule: Rule, ratio: float) -> tuple[BlockShape, ...]:
    """What each block keeps at `ratio`, aligned; protected blocks keep all."""
    blocks: list[BlockShape] = []
    for block, kept in zip(request.shape.blocks, rule(ratio), strict=True):
        units = axes.units(request.variant, block)
        # A multiple of `align` columns is a multiple of this many units.
        multiple = request.align // math.gcd(request.align, units.columns(request.shape.head_dim))
        heads = selection.align_up(kept.units, units.count, multiple)
        blocks.append(units.left(block, heads, selection.align_up(kept.neurons, block.neurons, request.align)))
    return tuple(blocks)


def _parameters(request: Request, rule: Rule, ratio: float) -> int:
    after = msgspec.structs.replace(request.shape, blocks=_widths(request, rule, ratio))
    return with_biases(after, COMPENSATED.get(request.compensation or "", ())).parameters


def _ratio_for_parameters(request: Request, rule: Rule) -> float:
    """The largest ratio that leaves no fewer parameters than asked; with at_most the smallest that leaves no more."""
    wanted = float(request.target.value)
    least, most = (_parameters(request, rule, ratio) for ratio in (1 - 2**-52, 2**-52))
    if wanted < least:
        raise PlanError(
            f"--target-params {wanted:g} cannot be reached by {request.method.name}: at least {least} parameters "
            f"stay{'' if request.protect == (0, 0) else ', ' + request.describe_protection()}; ask for more"
        )
    if request.at_most:
        return selection.last_true(lambda ratio: _parameters(request, rule, ratio) > wanted)[1]
    if wanted > most:
        raise PlanError(
            f"--target-params {wanted:g} is passed by the least that {request.method.name} removes here, which leaves "
            f"{most} parameters; ask for fewer"
        )
    return selection.last_true(lambda ratio: ratio < 1 and _parameters(request, rule, ratio) >= wanted)[0]
