"""Which KV groups and neurons a width plan keeps: the best of each unprotected block."""

from __future__ import annotations

import math
from collections.abc import Sequence

import msgspec

from shortllama import selection, width_rules
from shortllama.errors import InputError, PlanError
from shortllama.plans import COMPENSATED, BlockKeep, block_keep, with_biases
from shortllama.request import Request
from shortllama.shape import BlockShape
from shortllama.width_rules import Rule


def keep_widths(request: Request) -> tuple[BlockKeep, ...]:
    """Return the blocks with the widths that the target leaves; one that loses all its units goes as a whole.

    Raises InputError where nothing would go, or where only scores tell the widths and there are none.
    """
    rule = width_rules.rule(request)
    ratio = _ratio_for_parameters(request, rule) if request.target.kind == "target-params" else request.target.value
    widths = _widths(request, rule, float(ratio))
    whole = [(block.kv_heads, block.neurons) for block in request.shape.blocks]
    if widths == whole:
        raise InputError(
            f"--{request.target.kind} {request.target.value:g} removes no KV group and no neuron"
            f"{' once aligned' if request.align > 1 else ''}; ask for more"
        )
    scores = request.scores
    keep: list[BlockKeep] = []
    for index, (block, (groups, neurons)) in enumerate(zip(request.shape.blocks, widths, strict=True)):
        if groups == neurons == 0:
            continue
        group_scores = scores.kv_groups[index] if scores and scores.kv_groups else None
        neuron_scores = scores.neurons[index] if scores and scores.neurons else None
        keep.append(
            block_keep(index, block, _choose(group_scores, groups), _choose(neuron_scores, neurons)),
        )
    return tuple(keep)


def _choose(scores: Sequence[float] | None, keep: int) -> tuple[int, ...]:
    """The best `keep` units; the first ones in a blind plan."""
    return tuple(range(keep)) if scores is None else selection.highest(scores, keep)


def _widths(request: Request, rule: Rule, ratio: float) -> list[tuple[int, int]]:
    """KV groups and neurons that each block keeps at `ratio`, aligned; protected blocks keep all."""
    # A multiple of `align` columns is a multiple of this many KV groups of head_dim columns.
    group_multiple = request.align // math.gcd(request.align, request.shape.head_dim)
    return [
        (
            selection.align_up(kept.groups, block.kv_heads, group_multiple),
            selection.align_up(kept.neurons, block.neurons, request.align),
        )
        for block, kept in zip(request.shape.blocks, rule(ratio), strict=True)
    ]


def _parameters(request: Request, rule: Rule, ratio: float) -> int:
    blocks: list[BlockShape] = []
    for block, (groups, neurons) in zip(request.shape.blocks, _widths(request, rule, ratio), strict=True):
        per_group = block.query_heads // block.kv_heads if block.kv_heads else 0
        blocks.append(BlockShape(groups * per_group, groups, neurons))
    after = msgspec.structs.replace(request.shape, blocks=tuple(blocks))
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
