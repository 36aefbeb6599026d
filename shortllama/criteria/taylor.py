"""First-order Taylor: the change of the loss that removing a block predicts (Shortened LLaMA sec. 3.1).

Per weight |sum over samples of w * dloss/dw|, then summed over the block's matrices and norms. The loss is the mean
over all predicted tokens of the calibration, so the split into batches does not matter; the published code sums the
means of its batches instead, which counts the samples of a short last batch more than once.

Memory: one copy of the weights, one block's gradients, and the hidden state entering each block for all samples
(L * N * T * D values). The inputs are cached in one forward pass, then blocks are walked backward: each is recomputed
for every batch, fed the cached gradient of its output, reduced, and its gradients freed. As w is constant,
w * sum(g) = sum(w * g), so this is the published estimate exactly. Blocks in 16 bits are differentiated in float32.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from shortllama.criteria import Measured, Task
from shortllama.criteria.weights import scored_weights
from shortllama.stack import Stack, token_nll

NAME = "taylor"
UNIT = "block"
NEEDS = "calibration"


def score(task: Task) -> Measured:
    """Return sum over weights of |w * dloss/dw| for each block (nats); higher = keep. All weights stay as they are."""
    stack, blocks = task.stack, len(task.stack)
    for block in task.adapter.blocks:
        scored_weights(task.adapter, block)  # refuses a block it cannot score before any long work
    batches = list(task.batches())
    total = (2 * blocks + 1) * len(batches)
    inputs: list[list[Tensor]] = []
    for ids_BT in batches:
        with torch.no_grad():
            inputs.append(stack.trace(ids_BT)[0])
        task.progress(len(inputs) * blocks, total)
    gradients = [_tail_gradient(stack, ids, states.pop()) for ids, states in zip(batches, inputs, strict=True)]
    tokens = sum(ids.shape[0] * (ids.shape[1] - 1) for ids in batches)
    scores = [0.0] * blocks
    for index in reversed(range(blocks)):
        with _differentiable(stack.blocks[index]) as block:
            for number, ids_BT in enumerate(batches):
                gradients[number] = _step_back(stack, index, ids_BT, inputs[number].pop(), gradients[number])
                task.progress(total - index * len(batches) - (len(batches) - 1 - number), total)
            scores[index] = _reduce(scored_weights(task.adapter, block)) / tokens
    return Measured(blocks=tuple(scores))


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


def _reduce(weights: dict[str, nn.Parameter]) -> float:
    """Return sum |w * g| in float64 sums."""
    total = 0.0
    for weight in weights.values():
        assert weight.grad is not None, "every scored weight takes part in the forward pass"
        total += (weight.detach() * weight.grad).abs().sum(dtype=torch.float64).item()
    return total


@contextmanager
def _differentiable(block: nn.Module) -> Generator[nn.Module]:
    """Let the block's parameters collect gradients, in float32 where they are narrower; restore them afterwards."""
    kept = {parameter: (parameter.data, parameter.grad) for parameter in block.parameters()}
    try:
        for parameter, (data, _) in kept.items():
            parameter.grad = None
            parameter.data = data.to(torch.promote_types(data.dtype, torch.float32))
            parameter.requires_grad_(True)
        yield block
    finally:
        for parameter, (data, gradient) in kept.items():
            parameter.requires_grad_(False)
            parameter.grad = None  # before the data: a gradient must have its parameter's dtype
            parameter.data = data
            parameter.grad = gradient
