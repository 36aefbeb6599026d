"""First-order Taylor: the change of the loss that removing a block predicts (Shortened LLaMA sec. 3.1).

The loss is the mean over all predicted tokens of the calibration, so the split into batches does not matter; the
published code sums the means of its batches instead, which counts the samples of a short last batch more than once.
With g_n the gradient of sample n's part of that loss, three estimators, which rank differently:

    taylor          sum over weights of |w * sum_n g_n|, the published one
    taylor-sample   sum over weights and samples of |w * g_n|
    taylor-vector   sum over tensors of |sum over weights of w * sum_n g_n| (LLM-Pruner's "vectorize", arXiv 2305.11627)

each then summed over the block's matrices and norms, or aggregated as `weights.aggregate` is told.

Memory: the weights, at most one and a half blocks of gradients with all activations, and the hidden state entering
each block for all samples, which waits in memory or in a file (`boundaries`; `memory` has the sums). The states are
made by one forward pass, then blocks are walked backward: each is recomputed for every batch, fed the gradient of its
output, reduced, and its gradients freed. As w is constant, w * sum(g) = sum(w * g), so this is the published estimate
exactly. Blocks in 16 bits are differentiated in float32.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from shortllama.criteria import Measured, Task, memory
from shortllama.criteria.boundaries import Boundaries
from shortllama.criteria.gradients import Gradients, Sums, collected
from shortllama.criteria.weights import aggregate, by_piece, rows, scored_weights
from shortllama.removals import Piece
from shortllama.stack import Stack, token_nll

NAME = "taylor"
UNITS = ("block", "module")
NEEDS = "calibration"

# From a weight and its gradient to values by output neuron, or to one value, in float64.
Estimator = Callable[[Tensor, Tensor], Tensor]


def score(task: Task) -> Measured:
    """Return sum over weights of |w * dloss/dw| for each block (nats); higher = keep. All weights stay as they are."""
    return estimate(task, per_weight, each_sequence=False)


def per_weight(weight: Tensor, gradient: Tensor) -> Tensor:
    """Return sum over a row of |w * g| for each output neuron of a matrix, |w * g| of each element of a norm."""
    return rows(lambda w, g: (w * g).abs_(), weight, gradient)


def per_tensor(weight: Tensor, gradient: Tensor) -> Tensor:
    """Return |sum of w * g| over the tensor, as (1,)."""
    return rows(torch.mul, weight, gradient).sum().abs()[None]


def estimate(task: Task, estimator: Estimator, *, each_sequence: bool) -> Measured:
    """Return the aggregated `estimator` of w * g of each block or module; `each_sequence` sums it over samples."""
    assert task.calibration is not None, "the criterion needs calibration and got none"
    tokens = sum(len(ids) - 1 for ids in task.calibration.sequences)
    scores: dict[Piece, float | None] = {piece: task.journal.finished(piece) for piece in task.pieces}
    gradients = Sums()
    for measured in walk(task, gradients, each_sequence=each_sequence) if None in scores.values() else ():
        found: dict[Piece, dict[str, Tensor]] = {}
        for piece, weights in measured:
            values = found.setdefault(piece, {})
            for name, weight in weights.items():
                value = estimator(weight.detach(), gradients.of(weight))
                values[name] = values[name] + value if name in values else value
        for piece, values in found.items():
            scores[piece] = aggregate({name: value / tokens for name, value in values.items()}, task.reductions)
            task.journal.keep(piece, scores[piece])
    return task.measured([one for one in scores.values() if one is not None], task.reductions.record())


# Weights by name, of one piece of a block after the other.
Measuring = Iterator[tuple[Piece, dict[str, nn.Parameter]]]


def walk(task: Task, gradients: Gradients, *, each_sequence: bool) -> Iterator[Measuring]:
    """Yield, for each block, last block first, what yields its pieces once `gradients` has theirs.

    That is once for all samples, or once for each. Gradients are those of the summed NLL; they are let go of when a
    piece comes again, and when the walk goes on. By then what was made of a block must be in the task's journal, for a
    walk that goes on after a kill skips the blocks behind which the gradients were last carried there.
    """
    stack, blocks = task.stack, len(task.stack)
    for block in stack.blocks:
        scored_weights(task.adapter, block)  # refuses a block it cannot score before any long work
    batches = list(_batches(task, alone=each_sequence))
    total = (2 * blocks + 1) * len(batches)
    size = memory.states_backward(task.shape, sum(ids_BT.numel() for ids_BT in batches), task.dtype)
    with Boundaries(size, blocks * len(batches), stack.device) as waiting:
        left, carried = task.journal.carried() or (blocks, None)
        for number, ids_BT in enumerate(batches):
            last_BTD = _go_ahead(Stack(stack.model, stack.blocks[:left]), ids_BT, number, waiting)
            waiting["gradient", number] = (
                _tail_gradient(stack, ids_BT, last_BTD) if carried is None else next(carried).to(stack.device)
            )
            task.progress((number + 1) * (blocks + 1), total)

        def way_back(index: int, take_vectors: Callable[[], None]) -> Measuring:
            for number, ids_BT in enumerate(batches):
                _step_back(stack, index, ids_BT, number, waiting)
                take_vectors()
                task.progress(total - index * len(batches) - (len(batches) - 1 - number), total)
                if each_sequence or number == len(batches) - 1:
                    yield from by_piece(task, index).items()
                    gradients.clear()

        for index in reversed(range(left)):
            block = stack.blocks[index]
            with collected(block, scored_weights(task.adapter, block).values(), gradients) as take_vectors:
                yield way_back(index, take_vectors)
                gradients.clear()
            if index:
                task.journal.carry(index, lambda: (waiting["gradient", number] for number in range(len(batches))))


def _batches(task: Task, *, alone: bool) -> Iterator[Tensor]:
    """Yield the task's batches in parts small enough to be differentiated beside a block's gradients, or one by one."""
    for ids_BT in task.batches():
        rows_together = 1 if alone else memory.rows_backward(task.shape, ids_BT.shape[1], task.dtype)
        yield from ids_BT.split(rows_together)


def _go_ahead(stack: Stack, ids_BT: Tensor, number: int, waiting: Boundaries) -> Tensor:
    """Keep what enters each block but the first, (block, number); return what leaves the last one."""
    last_BTD: Tensor | None = None
    entered = itertools.count()

    def see(state_BTD: Tensor) -> None:
        nonlocal last_BTD
        index = next(entered)
        if 0 < index < len(stack):
            waiting[index, number] = state_BTD
        last_BTD = state_BTD

    with torch.no_grad():
        stack.watch(ids_BT, see)
    assert last_BTD is not None, "a stack has blocks"
    return last_BTD


def _tail_gradient(stack: Stack, ids_BT: Tensor, hidden_BTD: Tensor) -> Tensor:
    """Return d(summed NLL)/d(what leaves the last block), at least in float32.

    A sum, so that 16-bit logits' gradients do not underflow.
    """
    leaf = hidden_BTD.detach().requires_grad_(True)
    with torch.enable_grad():
        token_nll(stack.resume(ids_BT, leaf, at=len(stack)), ids_BT).sum().backward()
    assert leaf.grad is not None
    return leaf.grad.to(torch.promote_types(leaf.dtype, torch.float32))


def _step_back(stack: Stack, index: int, ids_BT: Tensor, number: int, waiting: Boundaries) -> None:
    """Add a batch's gradients to the block's parameters; the gradient of the block's input then waits for the next one.

    Block 0 reads the embedding's own output, whose gradient nobody needs.
    """
    gradient_BTD = waiting["gradient", number]
    leaf: Tensor | None = None
    if index:
        hidden_BTD = waiting[index, number]
        leaf = hidden_BTD.to(torch.promote_types(hidden_BTD.dtype, torch.float32)).detach().requires_grad_(True)
    with torch.enable_grad():
        output_BTD = stack.advance(ids_BT, leaf, at=index)
        output_BTD.backward(gradient_BTD.to(output_BTD.dtype))
    if leaf is not None:
        assert leaf.grad is not None
        waiting["gradient", number] = leaf.grad
