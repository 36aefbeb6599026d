"""First-order Taylor: the change of the loss that removing a block predicts (Shortened LLaMA sec. 3.1).

The loss is the mean over all predicted tokens of the calibration, so the split into batches does not matter; the
published code sums the means of its batches instead, which counts the samples of a short last batch more than once.
With g_n the gradient of sample n's part of that loss, three estimators, which rank differently:

    taylor          sum over weights of |w * sum_n g_n|, the published one
    taylor-sample   sum over weights and samples of |w * g_n|
    taylor-vector   sum over tensors of |sum over weights of w * sum_n g_n| (LLM-Pruner's "vectorize", arXiv 2305.11627)

each then summed over the block's matrices and norms, or aggregated as `weights.aggregate` is told.

Memory: one copy of the weights, one block's gradients, and the hidden state entering each block for all samples
(L * N * T * D values). The inputs are cached in one forward pass, then blocks are walked backward: each is recomputed
for every batch, fed the cached gradient of its output, reduced, and its gradients freed. As w is constant,
w * sum(g) = sum(w * g), so this is the published estimate exactly. Blocks in 16 bits are differentiated in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from shortllama.criteria import Measured, Task
from shortllama.criteria.weights import aggregate, by_piece, rows, scored_weights
from shortllama.removals import Piece
from shortllama.stack import Stack, token_nll

NAME = "taylor"
UNITS = ("block", "module")
NEEDS = "calibration"

Estimator = Callable[[Tensor], Tensor]


def score(task: Task) -> Measured:
    """Return sum over weights of |w * dloss/dw| for each block (nats); higher = keep. All weights stay as they are."""
    return estimate(task, per_weight, each_sequence=False)


def per_weight(product: Tensor) -> Tensor:
    """Return sum over a row of |w * g| for each output neuron of a matrix, |w * g| of each element of a norm."""
    return rows(product.abs())


def per_tensor(product: Tensor) -> Tensor:
    """Return |sum of w * g| over the tensor, as (1,)."""
    return product.sum(dtype=torch.float64).abs()[None]


def estimate(task: Task, estimator: Estimator, *, each_sequence: bool) -> Measured:
    """Return the aggregated `estimator` of w * g of each block or module; `each_sequence` sums it over samples."""
    found: dict[Piece, dict[str, Tensor]] = {piece: {} for piece in task.pieces}
    for piece, weights in walk(task, each_sequence):
        values = found[piece]
        for name, weight in weights.items():
            assert weight.grad is not None, "every scored weight takes part in the forward pass"
            value = estimator(weight.detach() * weight.grad)
            values[name] = values[name] + value if name in values else value
    assert task.calibration is not None, "the criterion needs calibration and got none"
    tokens = sum(len(ids) - 1 for ids in task.calibration.sequences)
    scores = [
        aggregate({name: value / tokens for name, value in values.items()}, task.reductions)
        for values in found.values()
    ]
    return task.measured(scores, task.reductions.record())


def walk(
    task: Task, each_sequence: bool, take: Callable[[Tensor], None] | None = None
) -> Iterator[tuple[Piece, dict[str, nn.Parameter]]]:
    """Yield each piece's weights with their gradients: once for all samples, or once for each; last block first.

    Gradients are those of the summed NLL. They are freed when the walk goes on; `take(parameter)` may use one and free
    it as soon as it is there.
    """
    stack, blocks = task.stack, len(task.stack)
    for block in stack.blocks:
        scored_weights(task.adapter, block)  # refuses a block it cannot score before any long work
    batches = [part for ids in task.batches() for part in ids.split(1 if each_sequence else len(ids))]
    total = (2 * blocks + 1) * len(batches)
    inputs: list[list[Tensor]] = []
    for ids_BT in batches:
        with torch.no_grad():
            inputs.append(stack.states(ids_BT))
        task.progress(len(inputs) * blocks, total)
    gradients = [_tail_gradient(stack, ids, states.pop()) for ids, states in zip(batches, inputs, strict=True)]
    for index in reversed(range(blocks)):
        with _differentiable(stack.blocks[index], take) as block:
            for number, ids_BT in enumerate(batches):
                gradients[number] = _step_back(stack, index, ids_BT, inputs[number].pop(), gradients[number])
                task.progress(total - index * len(batches) - (len(batches) - 1 - number), total)
                if each_sequence or number == len(batches) - 1:
                    yield from by_piece(task, index).items()
                    block.zero_grad(set_to_none=True)


def _tail_gradient(stack: Stack, ids_BT: Tensor, hidden_BTD: Tensor) -> Tensor:
    """Return d(summed NLL)/d(what leaves the last block). A sum, so that 16-bit logits' gradients do not underflow."""
    leaf = hidden_BTD.detach().requires_grad_(True)
    with torch.enable_grad():
        token_nll(stack.resume(ids_BT, leaf, at=len(stack)), ids_BT).sum().backward()
    assert leaf.grad is not None
    return leaf.grad


def _step_back(stack: Stack, index: int, ids_BT: Tensor, hidden_BTD: Tensor, gradient_BTD: Tensor) -> Tensor:
    """Add this batch's gradients to the block's parameters; return the gradient of the block's input.

    Block 0 reads the embedding's own output, which needs no gradient: `gradient_BTD` comes back unchanged.
    """
    wide = torch.promote_types(hidden_BTD.dtype, torch.float32)
    leaf = hidden_BTD.detach().to(wide).requires_grad_(True) if index else None
    with torch.enable_grad():
        output_BTD = stack.advance(ids_BT, leaf, at=index)
        output_BTD.backward(gradient_BTD.to(output_BTD.dtype))
    return gradient_BTD if leaf is None or leaf.grad is None else leaf.grad


@contextmanager
def _differentiable(block: nn.Module, take: Callable[[Tensor], None] | None) -> Generator[nn.Module]:
    """Let the block's parameters collect gradients, in float32 where they are narrower; restore them afterwards."""
    handles: list[RemovableHandle] = []
    kept = {parameter: (parameter.data, parameter.grad) for parameter in block.parameters()}
    try:
        for parameter, (data, _) in kept.items():
            parameter.grad = None
            parameter.data = data.to(torch.promote_types(data.dtype, torch.float32))
            parameter.requires_grad_(True)
            if take is not None:
                handles.append(parameter.register_post_accumulate_grad_hook(take))
        yield block
    finally:
        for handle in handles:
            handle.remove()
        for parameter, (data, gradient) in kept.items():
            parameter.requires_grad_(False)
            parameter.grad = None  # before the data: a gradient must have its parameter's dtype
            parameter.data = data
            parameter.grad = gradient
