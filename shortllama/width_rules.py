"""How many heads and neurons each block keeps at a ratio: the published rules, over shapes and scores. Pure.

Heads are counted in units of an axis (`axes`): KV groups, for which the rules were published, or query heads of every
group. Uniform rules count in each block alone. Adaptive ones put the units of all unprotected blocks in one order, best
first, and keep those strictly above a threshold, so that units equal to it go too, as in FLAP's code. A rule sorts
once and answers any number of ratios, because a target in parameters is searched by ratio.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import NamedTuple

from shortllama import axes, variants
from shortllama.errors import InputError
from shortllama.request import Request
from shortllama.scores import Scores
from shortllama.shape import BlockShape, ModelShape


class Widths(NamedTuple):
    """What a block keeps: units of its attention, and neurons."""

    units: int
    neurons: int


# From a ratio of what goes to the widths of every block. A rule never keeps more at a higher ratio.
Rule = Callable[[float], list[Widths]]


def rule(request: Request) -> Rule:
    """Return the rule of the request's method and structure. Raises InputError where it needs scores and has none."""
    structure = variants.structure_of(request.method.name, request.variant)
    if structure in ADAPTIVE and request.scores is None:
        raise InputError(
            f"{request.method.name} {structure} gives each block widths of its own, which only scores tell; prune real "
            "weights and name the folder, name a shape such as flap:26.9±7.5x8577±2078, or take --structure "
            f"{'local' if structure == 'global' else 'UL-UM'}"
        )
    return STRUCTURES[structure](request)


def adapts(request: Request) -> bool:
    """Whether widths depend on scores."""
    return variants.structure_of(request.method.name, request.variant) in ADAPTIVE


def group_values(shape: ModelShape, block: BlockShape) -> int:
    """Return the parameters, per hidden unit, of a KV group's projections: (2 H/K + 2) d; a neuron has 3."""
    return (2 * (block.query_heads // block.kv_heads) + 2) * shape.head_dim if block.kv_heads else 0


def _linear_parameters(shape: ModelShape, block: BlockShape) -> int:
    """Parameters of a block's projections, 3hf + (2 H/K + 2) h d K: FLAP's 3hf + 4h^2."""
    return shape.hidden * (3 * block.neurons + group_values(shape, block) * block.kv_heads)


def _free(request: Request) -> list[tuple[int, BlockShape]]:
    return [(index, request.shape.blocks[index]) for index in request.unprotected]


def _filled(request: Request, free: dict[int, Widths]) -> list[Widths]:
    """Widths of all blocks: protected ones are whole."""
    return [free.get(i, Widths(_heads(request, b), b.neurons)) for i, b in enumerate(request.shape.blocks)]


def _heads(request: Request, block: BlockShape) -> int:
    return axes.units(request.variant, block).count


# -- in each block alone ------------------------------------------------------------------------------------------


def _uniform(request: Request) -> Rule:
    """The method's own count of units and of neurons, in every block."""
    removes = request.method.removes

    def left(count: int, ratio: float) -> int:
        return count - removes(count, ratio)

    def widths(ratio: float) -> list[Widths]:
        kept = {i: Widths(left(_heads(request, b), ratio), left(b.neurons, ratio)) for i, b in _free(request)}
        return _filled(request, kept)

    return widths


def _local(request: Request) -> Rule:
    """LLM-Pruner's count in each block: C - int(C (1 - r)) channels of K and of the FFN, heads by whole d channels.

    The code skips a module that would lose everything; here its best unit stays. Query heads are counted in a group's.
    """
    head_dim = request.shape.head_dim

    def left(units: int, size: int, ratio: float) -> int:
        gone = _pruned(units * size, ratio) // size
        return units - min(gone, max(units - 1, 0))

    def widths(ratio: float) -> list[Widths]:
        kept = {
            i: Widths(left(_heads(request, b), head_dim, ratio), left(b.neurons, 1, ratio)) for i, b in _free(request)
        }
        return _filled(request, kept)

    return widths


def _manual_uniform(request: Request) -> Rule:
    """FLAP's UL-MM: the same number of heads from every block, and of its neurons what the ratio leaves to remove."""
    free, shape = _free(request), request.shape
    heads = _asked_heads(request) // len(free)

    def widths(ratio: float) -> list[Widths]:
        kept: dict[int, Widths] = {}
        for index, block in free:
            gone = min(heads, block.kv_heads)
            removed = shape.hidden * group_values(shape, block) * gone
            rest = int((ratio * _linear_parameters(shape, block) - removed) / (shape.hidden * 3))
            kept[index] = Widths(block.kv_heads - gone, block.neurons - _within(rest, block.neurons))
        return _filled(request, kept)

    return widths


def _asked_heads(request: Request) -> int:
    """The heads that a manual structure removes. Raises InputError where the ratio removes less than these alone."""
    heads = request.variant.remove_heads
    assert heads is not None, "checked with the variant"
    free, shape = _free(request), request.shape
    there = sum(block.kv_heads for _, block in free)
    if heads > there:
        raise InputError(f"--remove-heads {heads}: the unprotected blocks have {there} KV heads; ask for less")
    if request.target.kind == "ratio" and there:
        alone = shape.hidden * sum(group_values(shape, b) * b.kv_heads for _, b in free) * heads / there
        share = alone / sum(_linear_parameters(shape, block) for _, block in free)
        if share > float(request.target.value):
            raise InputError(
                f"--remove-heads {heads} alone removes {share:.3g} of the "
                f"projections, more than {request.describe_target()}; lower one or raise the other"
            )
    return heads


def _within(count: int, size: int) -> int:
    return min(max(count, 0), size)


# -- across blocks ------------------------------------------------------------------------------------------------


class _Order:
    """Units of some blocks, best first, with the costs so far. Equal values keep the order of the blocks."""

    def __init__(self, lists: Sequence[Sequence[float]], costs: Sequence[int]) -> None:
        units = sorted((-value, owner) for owner, values in enumerate(lists) for value in values)
        self.negated = [value for value, _ in units]
        self.costs = list(accumulate(costs[owner] for _, owner in units))
        self.positions: list[list[int]] = [[] for _ in lists]
        for position, (_, owner) in enumerate(units):
            self.positions[owner].append(position)

    def above(self, position: int) -> list[int]:
        """Return how many units of each list have values strictly above that of the unit at `position`."""
        whole = position >= len(self.negated)
        first = len(self.negated) if whole else bisect_left(self.negated, self.negated[position])
        return [bisect_left(positions, first) for positions in self.positions]

    def without(self, count: int) -> list[int]:
        """Return how many units of each list stay when the `count` lowest go, and all that equal the best of those."""
        return self.above(len(self.negated) - count)

    def nearest(self, share: float, fixed: int) -> int:
        """Return the position whose costs so far, with `fixed` ones, come nearest to `share` of all; the first of two.

        `fixed` is what stays whatever goes.
        """
        wanted = (self.costs[-1] + fixed) * share - fixed if self.costs else 0.0
        after = bisect_left(self.costs, wanted)
        near = range(max(after - 1, 0), min(after + 1, len(self.costs)))
        return min(near, key=lambda position: abs(self.costs[position] - wanted), default=0)


def _adaptive(request: Request) -> Rule:
    """FLAP's AL-AM: standardised heads and neurons of all blocks in one order, each priced by its parameters.

    In units of a neuron a head costs 4d/3, cut to a whole number by FLAP's code (an integer tensor) and by `flap`;
    `flap-exact` prices the unit's parameters exactly. Of query heads, one of every group stays, and K and V do: they
    are part of what the ratio is a share of, and of what is kept.
    """
    free, exact, head_dim = _free(request), request.method.name == "flap-exact", request.shape.head_dim
    units = [axes.units(request.variant, block) for _, block in free]
    lists, costs, fixed = [], [], 0
    for one, (index, block) in zip(units, free, strict=True):
        price = one.values(head_dim) if exact else one.values(head_dim) // 3 * 3
        lists += [sorted(_attention(request, index))[: one.count - one.least], _neurons(request, index)]
        costs += [price, 3]
        of_attention = group_values(request.shape, block) * block.kv_heads
        fixed += of_attention - one.values(head_dim) * one.count + price * one.least
    order = _Order(lists, costs)

    def widths(ratio: float) -> list[Widths]:
        counts = order.above(order.nearest(1 - ratio, fixed))
        pairs = zip(free, units, counts[::2], counts[1::2], strict=True)
        return _filled(request, {index: Widths(above + one.least, left) for (index, _), one, above, left in pairs})

    return widths


def _manual_adaptive(request: Request) -> Rule:
    """FLAP's AL-MM: that many heads of all blocks, and of all neurons what the ratio leaves to remove."""
    free, shape = _free(request), request.shape
    heads = _Order([_attention(request, index) for index, _ in free], [1] * len(free))
    neurons = _Order([_neurons(request, index) for index, _ in free], [1] * len(free))
    groups = heads.without(_asked_heads(request))
    gone = sum(group_values(shape, b) * (b.kv_heads - left) for (_, b), left in zip(free, groups, strict=True))
    # In the order of FLAP's own product, whose rounding shows where the result is near a whole number.
    mean = sum(_linear_parameters(shape, block) for _, block in free) / len(free)

    def widths(ratio: float) -> list[Widths]:
        count = int((len(free) * ratio * mean - shape.hidden * gone) / (shape.hidden * 3))
        left = neurons.without(_within(count, len(neurons.negated)))
        pairs = map(Widths, groups, left)
        return _filled(request, {index: pair for (index, _), pair in zip(free, pairs, strict=True)})

    return widths


def _global(request: Request) -> Rule:
    """LLM-Pruner's global mode: of N heads and neurons together, the N - int(N (1 - r)) lowest go, at one threshold.

    Scores are compared as they are; a head's is a sum over d channels of four weights, so neurons go first. A module's
    best unit stays, as in `_local`.
    """
    free, scores = _free(request), _scores(request)
    lists: list[Sequence[float]] = []
    for index, _ in free:
        lists += [one[index] for one in (scores.kv_groups, scores.neurons) if one]
    order = _Order(lists, [1] * len(lists))
    units = len(order.negated)

    def widths(ratio: float) -> list[Widths]:
        left = order.without(_pruned(units, ratio))
        counts = [max(count, min(1, len(one))) for count, one in zip(left, lists, strict=True)]
        pairs = zip(counts[::2], counts[1::2], strict=True)
        return _filled(request, {index: Widths(*pair) for (index, _), pair in zip(free, pairs, strict=True)})

    return widths


def _pruned(count: int, ratio: float) -> int:
    return count - int(count * (1 - ratio))


def _attention(request: Request, index: int) -> list[float]:
    """The mean standardised score of each unit's channels (FLAP sec. 3.3), from the unit's sum.

    Channels are standardised over those of the block, with the unbiased deviation that the scores record; the mean
    of a unit's channels is then its own mean, standardised.
    """
    scores, block = _scores(request), request.shape.blocks[index]
    channels = axes.units(request.variant, block).query_heads * request.shape.head_dim
    means = [total / channels for total in axes.sums(request.variant, scores, index, block)]
    deviation = (scores.details or {})["attention_deviation"][index]
    return _standardised(means, deviation)


def _neurons(request: Request, index: int) -> list[float]:
    scores = _scores(request)
    values = scores.neurons[index] if scores.neurons else ()
    mean = math.fsum(values) / max(len(values), 1)
    squares = math.fsum((value - mean) ** 2 for value in values)
    return _standardised(values, math.sqrt(squares / max(len(values) - 1, 1)))


def _standardised(values: Sequence[float], deviation: float) -> list[float]:
    """Values as deviations from their mean; zeros where all channels are equal (a dead module)."""
    mean = math.fsum(values) / max(len(values), 1)
    return [(value - mean) / deviation if deviation > 0 else 0.0 for value in values]


def _scores(request: Request) -> Scores:
    assert request.scores is not None, "adaptive rules have scores"
    return request.scores


STRUCTURES: dict[str | None, Callable[[Request], Rule]] = {
    None: _uniform,
    "UL-UM": _uniform,
    "UL-MM": _manual_uniform,
    "AL-MM": _manual_adaptive,
    "AL-AM": _adaptive,
    "local": _local,
    "global": _global,
}
ADAPTIVE = ("AL-AM", "AL-MM", "global")
