"""Shape-only plans as text: enough to ask what a pruned shape costs, without weights, scores or data.

Latency does not depend on which block or channel is gone, so a blind plan keeps the first units and is refused on real
weights. Grammar (groups are KV groups: the heads of a model without grouped attention):

    depth:26                      26 blocks stay
    width:24x8256                 24 groups and 8256 neurons stay in every block
    width:24x8256@4-30            the same in blocks 4 to 29 only
    width:24:8x8256               24 query heads stay, as many in each of 8 groups
    flap:26.9±7.5x8577±2078       mean ± standard deviation over the blocks, drawn with a seed (`+-` is `±`)
    wanda-sp:0.2                  what METHOD:RATIO removes
    depth:16..32                  a range of plans, both ends included (`expand`)
"""

from __future__ import annotations

import math
import random
import re
from bisect import bisect_left
from collections.abc import Callable

import msgspec

from shortllama import methods, selection
from shortllama.errors import InputError, PlanError
from shortllama.indices import format_indices
from shortllama.planning import make_plan_for
from shortllama.plans import BlockKeep, Plan, Provenance, Target, make_plan
from shortllama.shape import BlockShape, ModelShape

_NUMBER = r"(\d+(?:\.\d+)?)"
_DEPTH = re.compile(r"depth:(\d+)")
_WIDTH = re.compile(r"width:(?:(\d+):)?(\d+)x(\d+)(?:@(\d+)-(\d+))?")
_FLAP = re.compile(rf"flap:{_NUMBER}±{_NUMBER}x{_NUMBER}±{_NUMBER}")
_METHOD = re.compile(r"([a-z][a-z0-9+-]*):(-?\d*\.?\d+(?:e-?\d+)?)")
_RANGE = re.compile(r"(.*\bdepth:)(\d+)\.\.(\d+)")

GRAMMAR = "depth:26, width:24x8256@4-30, width:24:8x8256, flap:26.9±7.5x8577±2078 or METHOD:RATIO"


def parse(text: str, *, model: str, shape: ModelShape, seed: int = 0) -> Plan:
    """Return the blind plan that `text` means for `shape`, a base called `model`. `seed` draws the widths of flap.

    Raises InputError for text outside the grammar, PlanError for sizes that the shape does not have.
    """
    text = text.replace("+-", "±")
    for pattern, make in _FORMS.items():
        match = pattern.fullmatch(text)
        if match:
            return make_plan(
                model=model,
                shape=shape,
                method=text.partition(":")[0],
                target=Target("shape", text),
                keep=make(match, shape, seed),
                blind=True,
                provenance=Provenance(seed=seed if pattern is _FLAP else None),
            )
    match = _METHOD.fullmatch(text)
    if match and match[1] not in ("depth", "width"):
        method = methods.lookup(match[1]).name
        return make_plan_for(method, model=model, shape=shape, target=Target("ratio", float(match[2])))
    raise InputError(f"plan {text!r} is not understood; write {GRAMMAR}")


def expand(name: str) -> tuple[str, ...]:
    """Return the names that a range such as `llama-7b/depth:16..32` stands for; any other name stands for itself."""
    match = _RANGE.fullmatch(name)
    if not match:
        return (name,)
    first, last = int(match[2]), int(match[3])
    if first > last:
        raise InputError(f"{name!r}: the range runs from {first} down to {last}; write {last}..{first}")
    return tuple(f"{match[1]}{count}" for count in range(first, last + 1))


# -- the forms ----------------------------------------------------------------------------------------------------


def _depth(match: re.Match[str], shape: ModelShape, seed: int) -> tuple[BlockKeep, ...]:
    count = int(match[1])
    if not 1 <= count <= len(shape.blocks):
        raise PlanError(f"{match[0]}: between 1 and {len(shape.blocks)} blocks of this model can stay")
    return tuple(BlockKeep(index) for index in range(count))


def _width(match: re.Match[str], shape: ModelShape, seed: int) -> tuple[BlockKeep, ...]:
    groups, neurons = int(match[2]), int(match[3])
    queries = None if match[1] is None else int(match[1])
    first, end = int(match[4] or 0), int(match[5] or len(shape.blocks))
    if not first < end <= len(shape.blocks):
        raise PlanError(
            f"{match[0]}: blocks {first} to {end} (end not included) are no range of this model's {len(shape.blocks)}"
        )
    keep: list[BlockKeep] = []
    for index, block in enumerate(shape.blocks):
        inside = first <= index < end
        keep.append(_first_units(match[0], index, block, groups, neurons, queries) if inside else BlockKeep(index))
    return tuple(keep)


def _first_units(
    text: str, index: int, block: BlockShape, groups: int, neurons: int, queries: int | None = None
) -> BlockKeep:
    """Keep the first `groups` and `neurons` of a block, and `queries` heads in these groups, or say which it lacks."""
    size = block.queries_per_group
    if groups > block.kv_heads:
        units = "heads" if size <= 1 else f"KV groups of {size} query heads"
        raise PlanError(f"{text}: block {index} has {block.kv_heads} {units}, not {groups}; ask for less")
    if neurons > block.neurons:
        raise PlanError(f"{text}: block {index} has {block.neurons} neurons, not {neurons}; ask for less")
    if groups == neurons == 0:
        raise PlanError(f"{text}: leaves nothing of block {index}; remove whole blocks with depth:N")
    keep = BlockKeep(index, _first(groups, block.kv_heads), _first(neurons, block.neurons))
    if queries is None or queries == groups * size:
        return keep
    if groups == 0 or queries % groups or not 0 < queries <= groups * size:
        raise PlanError(
            f"{text}: {queries} query heads cannot stay in {groups} KV groups of block {index}; every group keeps as "
            f"many, 1 to {size}"
        )
    stay = selection.heads_within(range(groups), size, queries // groups)
    return msgspec.structs.replace(keep, queries=format_indices(stay))


def _first(count: int, size: int) -> str | None:
    """The index set of the first `count` of `size`."""
    if count == size:
        return None
    return "" if count == 0 else "0" if count == 1 else f"0-{count - 1}"


def _flap(match: re.Match[str], shape: ModelShape, seed: int) -> tuple[BlockKeep, ...]:
    source = random.Random(seed)
    group_mean, group_sd, neuron_mean, neuron_sd = map(float, match.groups())
    groups = spread(group_mean, group_sd, [block.kv_heads for block in shape.blocks], source, "KV groups")
    neurons = spread(neuron_mean, neuron_sd, [block.neurons for block in shape.blocks], source, "neurons")
    return tuple(
        _first_units(match[0], index, block, groups[index], neurons[index]) for index, block in enumerate(shape.blocks)
    )


_FORMS: dict[re.Pattern[str], Callable[[re.Match[str], ModelShape, int], tuple[BlockKeep, ...]]] = {
    _DEPTH: _depth,
    _WIDTH: _width,
    _FLAP: _flap,
}


# -- seeded widths with a given mean and deviation ----------------------------------------------------------------


def spread(mean: float, deviation: float, largest: list[int], source: random.Random, unit: str) -> list[int]:
    """Return one count per block, 1 to `largest[i]`, with sum round(mean * blocks) and the standard deviation asked.

    The deviation is met between its two estimators (dividing by n and by n - 1), because published tables do not say
    which they used: each is within 1 % for 32 blocks. Counts are exact integers; only `source.random()` is drawn.
    Raises PlanError where bounds or whole numbers do not allow it within 2 % or half a unit.
    """
    blocks = len(largest)
    total = round(mean * blocks)
    if not blocks <= total <= sum(largest):
        raise PlanError(f"a mean of {mean:g} {unit} is not between 1 and the {sum(largest) / blocks:g} of this model")
    drawn = [source.random() - 0.5 for _ in largest]
    wanted = deviation * (1 - 1 / blocks) ** 0.25
    low, high = 0.0, 100.0 * max(largest)
    for _ in range(40):
        scale = (low + high) / 2
        low, high = (scale, high) if _deviation(_centred(drawn, scale, total, largest)) < wanted else (low, scale)
    counts = _whole(_centred(drawn, low, total, largest), total, largest)
    _nudge(counts, wanted, largest)
    reached = _deviation([float(count) for count in counts])
    if abs(reached - wanted) > max(0.02 * deviation, 0.5):
        raise PlanError(
            f"{mean:g}±{deviation:g} {unit}: the nearest deviation that {blocks} blocks allow is {reached:.3g}"
        )
    return counts


def _centred(drawn: list[float], scale: float, total: int, largest: list[int]) -> list[float]:
    """`drawn` times `scale`, shifted and cut to [1, largest] so that the sum is `total`."""
    scaled = [scale * x for x in drawn]

    def cut(shift: float) -> list[float]:
        return [min(max(shift + x, 1.0), top) for x, top in zip(scaled, largest, strict=True)]

    # The sum is piecewise linear in the shift, with corners where a value starts to move or meets its bound.
    corners = sorted({1 - x for x in scaled} | {top - x for x, top in zip(scaled, largest, strict=True)})
    position = bisect_left(corners, total, key=lambda shift: sum(cut(shift)))
    if position in (0, len(corners)):
        return cut(corners[min(position, len(corners) - 1)])
    low, high = corners[position - 1], corners[position]
    below, above = sum(cut(low)), sum(cut(high))
    return cut(low + (high - low) * (total - below) / (above - below))


def _deviation(values: list[float]) -> float:
    mean = sum(values) / len(values)
    return math.sqrt(sum((value - mean) ** 2 for value in values) / len(values))


def _whole(values: list[float], total: int, largest: list[int]) -> list[int]:
    """Round to integers of sum `total`: floors, then one more for the largest remainders."""
    counts = [math.floor(value) for value in values]
    order = sorted(range(len(values)), key=lambda i: counts[i] - values[i])
    room = [i for i in order if counts[i] < largest[i]]
    for i in room[: total - sum(counts)]:
        counts[i] += 1
    assert sum(counts) == total
    return counts


def _nudge(counts: list[int], wanted: float, largest: list[int]) -> None:
    """Move single units between two blocks, in place, as long as that brings the deviation nearer."""
    blocks = len(counts)
    for _ in range(blocks):
        squares = sum(c * c for c in counts) / blocks - (sum(counts) / blocks) ** 2
        gap = (wanted**2 - squares) * blocks
        moves = (
            (abs(2 * (counts[i] - counts[j]) + 2 - gap), i, j)
            for i in range(blocks)
            for j in range(blocks)
            if i != j and counts[i] < largest[i] and counts[j] > 1
        )
        best = min(moves, default=None)
        if best is None or best[0] >= abs(gap):
            return
        counts[best[1]] += 1
        counts[best[2]] -= 1
