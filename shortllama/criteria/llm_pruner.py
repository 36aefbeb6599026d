"""LLM-Pruner: first- and second-order importance of coupled channels (arXiv 2305.11627, sec. 3.2), block-wise mode.

A channel of a module is coupled through several weights: row c of q, k and v with column c of o, row c of gate and up
with column c of down. With g the gradient of the mean loss and a the mean over samples of squared gradients of the
sample's mean loss (the diagonal of the Fisher matrix), a weight's salience is, by `estimator`,

    param_first     w * g                        param_mix    w * g - w^2 * a / 2
    param_second    w^2 * a                      vectorize    w * g

Over a row or column, param_* sum the magnitudes and vectorize takes the magnitude of the sum; l1 and l2 sum |w| and w^2
and need no data. The weights' values of one channel become one by `group_reduction`, and a KV group has the sum of its
d channels. q and o have H * d channels: head j reads KV head j // (H/K), so they are folded as (K, H/K, d) first.
(LLM-Pruner's code for Llama 3 credits head j to KV head j mod K, which chooses other heads.) The first weight of a
group is q, as in its traversal, and k where heads are grouped, its root there. A query head that goes alone leaves k
and v to the others of its group: its coupled weights are q and o, its score is the sum of their d channels.

Gradients are made block by block as in `taylor`: one block's exist at a time. A sequence's are squared as soon as a few
rows of them are made, so that second order holds one block of squares, and param_mix also one of sums. With `steps`,
the pruning `towards` a shape goes in that many equal parts, each scored with the model as the parts before left it; all
see the same calibration, where the published code draws anew. Scores are then ranks in each block, 0 for the first to
go.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from shortllama import variants
from shortllama.criteria import Measured, Task, taylor, widths
from shortllama.criteria.gradients import Sums
from shortllama.criteria.wanda_sp import OUTPUTS, masked
from shortllama.criteria.weights import columns, floats, per_group, pieces, rows, scored_weights
from shortllama.errors import InputError
from shortllama.shape import BlockShape

NAME = "llm-pruner"
UNITS = ("width",)
NEEDS = "calibration"

# The coupled weights of each module in the order of LLM-Pruner's traversal.
_ATTENTION = ("q", "o", "v", "k")
_GROUPED = ("k", "q", "o", "v")
_QUERY = ("q", "o")
_MLP = ("gate", "up", "down")


class _Found(NamedTuple):
    """Scores of every unit of one kind, a list for each block."""

    groups: list[tuple[float, ...]]
    queries: list[tuple[float, ...]]
    neurons: list[tuple[float, ...]]


# From a weight to what its salience is made of, tensors of its shape, and the function that makes it, value by value.
_Salience = Callable[[nn.Parameter], tuple[Callable[..., Tensor], tuple[Tensor, ...]]]


def score(task: Task) -> Measured:
    """Return scores of each block's KV groups, query heads and neurons; higher = keep.

    Those of groups and neurons are on one scale, which only the structure `global` reads; those of query heads tell
    apart the heads of a group. Raises InputError for steps without a shape to go towards.
    """
    steps = variants.steps_of(task.variant)
    details: dict[str, Any] = {**task.variant.record(NAME)}
    if steps == 1:
        found = _measure(task)
    else:
        found = _step_by_step(task, steps)
        assert task.towards is not None, "checked"
        details["towards"] = widths(task.towards)
    groups, queries, neurons = map(tuple, found)
    return Measured(kv_groups=groups, neurons=neurons, query_heads=queries, details=details)


def _measure(task: Task) -> _Found:
    """Score the model as it is now."""
    blocks = len(task.stack)
    found = _Found([()] * blocks, [()] * blocks, [()] * blocks)
    finished = [task.journal.finished(index) for index in range(blocks)]
    for index, lists in enumerate(finished):
        if lists is not None:
            found.groups[index], found.queries[index], found.neurons[index] = map(tuple, lists)
    for index, saliences in _saliences(task) if None in finished else ():
        size = task.shape.blocks[index]
        values = _channels(task, index, saliences)
        if size.kv_heads:
            found.groups[index] = floats(_of_groups(task, size, values))
            channels = _reduce(task, torch.stack([values[name] for name in _QUERY]))
            found.queries[index] = floats(per_group(channels, size.query_heads))
        if size.neurons:
            found.neurons[index] = floats(_reduce(task, torch.stack([values[name] for name in _MLP])))
        task.journal.keep(index, [kind[index] for kind in found])
    return found


# -- weights ----------------------------------------------------------------------------------------------------------


def _saliences(task: Task) -> Iterator[tuple[int, _Salience]]:
    """Yield each block's number and what tells the salience of one of its weights, which holds until the next block."""
    estimator = variants.estimator_of(task.variant)
    if estimator in variants.MAGNITUDES:
        for index in range(len(task.stack)):
            yield index, lambda weight: (_magnitude if estimator == "l1" else _square, (weight.detach(),))
            task.progress(index + 1, len(task.stack))
    elif estimator in ("param_second", "param_mix"):
        yield from _second_order(task, estimator == "param_mix")
    else:
        sums, tokens = Sums(), sum(_predicted(task))
        for block in _walked(task, sums):
            yield block, lambda weight: (lambda w, g: w * g / tokens, (weight.detach(), sums.of(weight)))


def _walked(task: Task, gradients: taylor.Gradients) -> Iterator[int]:
    """Yield each block's number once `gradients` has the whole block's, which holds until the next one."""
    for measured in taylor.walk(task, gradients, each_sequence=False):
        yield next(measured)[0].block


def _predicted(task: Task) -> list[int]:
    """Return the number of predicted tokens of each sequence."""
    assert task.calibration is not None, "the criterion needs calibration and got none"
    return [len(ids) - 1 for ids in task.calibration.sequences]


def _magnitude(w: Tensor) -> Tensor:
    return w.to(torch.promote_types(w.dtype, torch.float32)).abs()


def _square(w: Tensor) -> Tensor:
    return _magnitude(w).square_()


def _second_order(task: Task, mix: bool) -> Iterator[tuple[int, _Salience]]:
    """The saliences of param_second, or of param_mix: moments are summed sequence by sequence, one block at a time."""
    lengths = _predicted(task)
    samples, tokens = len(lengths), sum(lengths)
    moments = _Moments(mix)

    def second(w: Tensor, squares: Tensor) -> Tensor:
        return w.square() * squares / samples

    def both(w: Tensor, squares: Tensor, sums: Tensor) -> Tensor:
        return w * sums / tokens - second(w, squares) / 2

    for block in _walked(task, moments):
        yield block, lambda weight: (both if mix else second, (weight.detach(), *moments.of(weight)))


class _Moments:
    """Sums over sequences: of squared gradients of their mean losses and, to mix, of gradients of their summed losses.

    The first are made a few rows at a time.
    """

    def __init__(self, mix: bool) -> None:
        self._squares: dict[Tensor, Tensor] = {}
        self._sums = Sums() if mix else None

    def add_product(self, weight: Tensor, back_BTO: Tensor, into_BTI: Tensor) -> None:
        """Take a matrix's gradients, of one sequence after the other for the same rows."""
        if self._sums is not None:
            self._sums.add_product(weight, back_BTO, into_BTI)
        if weight not in self._squares:
            self._squares[weight] = torch.zeros_like(weight, dtype=back_BTO.dtype, requires_grad=False)
        scale = (back_BTO.shape[1] - 1) ** -2
        first, made = 0, None
        for (squares,) in pieces(self._squares[weight]):
            last = first + len(squares)
            made = torch.empty_like(squares) if made is None else made[: len(squares)]
            for back_TO, into_TI in zip(back_BTO[..., first:last], into_BTI, strict=True):
                gradient = torch.mm(back_TO.T, into_TI, out=made)
                squares.addcmul_(gradient, gradient, value=scale)
            first = last

    def add(self, weight: Tensor, gradient: Tensor) -> None:
        """Norms have no part in channels."""

    def of(self, weight: Tensor) -> tuple[Tensor, ...]:
        """Return the squares, to mix also the sums, of a weight's shape."""
        return (self._squares[weight],) if self._sums is None else (self._squares[weight], self._sums.of(weight))

    def clear(self) -> None:
        """Let go of one block's moments."""
        self._squares.clear()
        if self._sums is not None:
            self._sums.clear()


# -- channels ---------------------------------------------------------------------------------------------------------


def _channels(task: Task, index: int, salience: _Salience) -> dict[str, Tensor]:
    """Return the value of every channel of each projection, by its short name, in float64."""
    family, estimator = task.adapter.family, variants.estimator_of(task.variant)
    found: dict[str, Tensor] = {}
    weights = scored_weights(task.adapter, task.stack.blocks[index])
    for short, path in family.projections.items():
        weight = weights.get(f"{path}.weight")
        if weight is None:
            continue
        with torch.no_grad():
            of, tensors = salience(weight)
            value = of if estimator == "vectorize" else lambda *parts, of=of: of(*parts).abs_()
            summed = columns(value, *tensors) if short in OUTPUTS else rows(value, *tensors)
            found[short] = summed.abs() if estimator == "vectorize" else summed
    return _split(task, task.shape.blocks[index], found)


def _split(task: Task, size: BlockShape, found: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the channels of q, k, v and of gate, up apart where a family has them in one matrix."""
    heads = {"q": size.query_heads, "k": size.kv_heads, "v": size.kv_heads}
    apart = dict(found)
    if "qkv" in found:
        parts = apart.pop("qkv").split([count * task.shape.head_dim for count in heads.values()])
        apart |= dict(zip(heads, parts, strict=True))
    if "gate_up" in found:
        apart |= dict(zip(("gate", "up"), apart.pop("gate_up").chunk(2), strict=True))
    return apart


def _of_groups(task: Task, size: BlockShape, values: dict[str, Tensor]) -> Tensor:
    """Return (K,) scores of KV groups."""
    order = _ATTENTION if size.query_heads == size.kv_heads else _GROUPED
    folded = [fold(values[name], size.kv_heads, task.shape.head_dim) for name in order]
    return _reduce(task, torch.stack(folded)).view(size.kv_heads, -1).sum(dim=1)


def fold(values: Tensor, groups: int, head_dim: int) -> Tensor:
    """Return (K * d,) channels from (H * d,) in query-head order, (K, H/K, d); those of KV heads as they are."""
    return values.view(groups, -1, head_dim).sum(dim=1).flatten()


def _reduce(task: Task, values: Tensor) -> Tensor:
    """Return one value a channel (C,) from one a coupled weight (W, C)."""
    how = variants.group_reduction_of(task.variant)
    if how == "first":
        return values[0]
    return values.amax(dim=0) if how == "max" else getattr(values, how)(dim=0)


# -- steps ------------------------------------------------------------------------------------------------------------


class _Order:
    """The units of one kind in the order in which they go, which is one order for each of `runs` equal runs of them."""

    def __init__(self, size: int, runs: int = 1) -> None:
        self.size = size
        self.gone: list[list[int]] = [[] for _ in range(runs)]

    def remove(self, scores: tuple[float, ...], count: int) -> None:
        """Let the lowest of what is left of every run go, until `count` of it are gone."""
        for run, gone in enumerate(self.gone):
            length = self.size // len(self.gone)
            left = sorted(set(range(run * length, (run + 1) * length)) - set(gone), key=scores.__getitem__)
            gone += left[: max(0, count - len(gone))]

    def ranks(self) -> tuple[float, ...]:
        """Return when each unit went from its run, 0 first; all must be gone."""
        when = {unit: float(rank) for gone in self.gone for rank, unit in enumerate(gone)}
        return tuple(when[unit] for unit in range(self.size))

    def mask(self, repeats: int) -> Tensor:
        """Return 1 for each channel of a unit that is left, `repeats` a unit."""
        kept = torch.ones(self.size)
        kept[[unit for gone in self.gone for unit in gone]] = 0
        return kept.repeat_interleave(repeats)


# Of a block: its KV groups, the query heads of each, its neurons.
_Orders = tuple[_Order, _Order, _Order]


def _step_by_step(task: Task, steps: int) -> _Found:
    """Return ranks: score, cut one part of the way to `towards`, score what is left, and so on; then rank the rest."""
    if task.towards is None:
        raise InputError("--steps goes towards a target; give it to plan or prune, not to score")
    orders = [
        (_Order(size.kv_heads), _Order(size.query_heads, size.kv_heads), _Order(size.neurons))
        for size in task.shape.blocks
    ]
    for step in range(1, steps + 1):
        with _cut(task, orders):
            now = _part(task.progress, step - 1, steps)
            measured = _measure(dataclasses.replace(task, progress=now, journal=task.journal.part(f"step {step}")))
        for index, (size, after) in enumerate(zip(task.shape.blocks, task.towards.blocks, strict=True)):
            in_groups = (size.queries_per_group, after.queries_per_group)
            counts = ((size.kv_heads, after.kv_heads), in_groups, (size.neurons, after.neurons))
            for order, lists, (whole, left) in zip(orders[index], measured, counts, strict=True):
                order.remove(lists[index], whole if step == steps else (whole - left) * step // steps)
    return _Found(*([order.ranks() for order in kind] for kind in zip(*orders, strict=True)))


def _part(progress: Callable[[int, int], None], step: int, steps: int) -> Callable[[int, int], None]:
    return lambda done, total: progress(step * total + done, steps * total)


@contextmanager
def _cut(task: Task, orders: list[_Orders]) -> Generator[None]:
    """Zero what the units that are gone put out: the rest then has the gradients of the sliced model."""
    with ExitStack() as restore:
        for block, size, kinds in zip(task.stack.blocks, task.shape.blocks, orders, strict=True):
            groups, queries, neurons = kinds
            outputs = {name: one for name, one in task.adapter.projections(block).items() if name in OUTPUTS}
            masks: dict[str, Tensor] = {}
            if size.kv_heads:
                of_groups = groups.mask(size.queries_per_group * task.shape.head_dim)
                masks["o"] = of_groups * queries.mask(task.shape.head_dim)
            if size.neurons:
                masks["down"] = neurons.mask(1)
            restore.enter_context(masked(outputs, masks))
        yield
