"""Which KV groups and neurons a width plan keeps: the best of each unprotected block."""

from __future__ import annotations

import math
from collections.abc import Sequence

import msgspec

from shortllama import selection
from shortllama.errors import InputError, PlanError
from shortllama.plan import BlockKeep, block_keep
from shortllama.request import Request
from shortllama.shape import BlockShape


def keep_widths(request: Request) -> tuple[BlockKeep, ...]:
    """Return all blocks with the widths that the target leaves. Raises InputError where nothing would go."""
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


def _widths(request: Request, ratio: float) -> list[tuple[int, int]]:
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


def _parameters(request: Request, ratio: float) -> int:
    blocks: list[BlockShape] = []
    for block, (groups, neurons) in zip(request.shape.blocks, _widths(request, ratio), strict=True):
        per_group = block.query_heads // block.kv_heads if block.kv_heads else 0
        blocks.append(BlockShape(groups * per_group, groups, neurons))
    return msgspec.structs.replace(request.shape, blocks=tuple(blocks)).parameters


def _ratio_for_parameters(request: Request) -> float:
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
