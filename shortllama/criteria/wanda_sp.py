"""Wanda-sp: weight magnitude times the norm of what meets it, by column (FLAP's structured Wanda, arXiv 2312.11983).

For an input channel j of o_proj or down_proj: mean over output rows of |W_ij| * sqrt(s_j), where s_j is the mean over
sequences of the sum over tokens of x_j^2. A query head has the sum of its channels, a KV group that of its query
heads. Both modules are scored from one forward pass of the block as it is, without compensation.

The method is sequential: the output of the *pruned* block feeds the next one, so scores depend on how much is removed.
The task's `towards` says how many heads and neurons each block will keep; without it (no target yet) dense outputs
feed on. `details["towards"]` records which, and `criteria.remark` tells when scores meet another target.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from shortllama import selection
from shortllama.criteria import Measured, Task, widths
from shortllama.criteria.weights import floats, per_group

NAME = "wanda-sp"
UNITS = ("width",)
NEEDS = "calibration"

# What is scored and cut in a block: the projections whose input channels are the heads' and the neurons' outputs.
OUTPUTS = ("o", "down")


@torch.no_grad()
def score(task: Task) -> Measured:
    """Return scores of each block's KV groups, query heads and neurons, comparable within the block; higher = keep."""
    batches = list(task.batches())
    start, carried = task.journal.carried() or (0, [None] * len(batches))
    hidden = [None if state is None else state.to(task.stack.device) for state in carried]
    finished = [task.journal.finished(index) for index in range(start)]
    groups, queries, neurons = ([tuple(lists[kind]) for lists in finished] for kind in range(3))
    done = start * len(batches)
    for index, block in list(enumerate(task.adapter.blocks))[start:]:
        projections = {name: p for name, p in task.adapter.projections(block).items() if name in OUTPUTS}
        with _square_sums(projections) as sums:
            dense = []
            for number, ids_BT in enumerate(batches):
                dense.append(task.stack.advance(ids_BT, hidden[number], at=index))
                done += 1
                task.progress(done, len(task.stack) * len(batches))
        column = {name: _columns(p, sums[name] / task.sequences) for name, p in projections.items()}
        size, heads = task.shape.blocks[index], column.get("o", torch.zeros(0))
        groups.append(floats(per_group(heads, size.kv_heads)))
        queries.append(floats(per_group(heads, size.query_heads)))
        neurons.append(floats(column["down"]) if "down" in column else ())
        task.journal.keep(index, [groups[-1], queries[-1], neurons[-1]])
        kept = _kept(task, index, groups[-1], queries[-1], neurons[-1])
        if kept is None:
            hidden = dense
        else:
            del dense
            with masked(projections, kept):
                hidden = [task.stack.advance(ids, state, at=index) for ids, state in zip(batches, hidden, strict=True)]
        task.journal.carry(index + 1, partial(iter, hidden))
    towards = None if task.towards is None else widths(task.towards)
    return Measured(
        kv_groups=tuple(groups), neurons=tuple(neurons), query_heads=tuple(queries), details={"towards": towards}
    )


@contextmanager
def _square_sums(projections: dict[str, nn.Linear]) -> Generator[dict[str, Tensor]]:
    """Collect, for each projection, sum over sequences and tokens of its inputs squared, (inputs,) float64."""
    sums = {
        name: torch.zeros(p.in_features, dtype=torch.float64, device=p.weight.device) for name, p in projections.items()
    }

    def hook(name: str) -> Any:
        def add(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x_BTF = inputs[0].to(torch.promote_types(inputs[0].dtype, torch.float32))
            sums[name] += x_BTF.square().flatten(0, 1).sum(dim=0)

        return add

    handles = [p.register_forward_pre_hook(hook(name)) for name, p in projections.items()]
    try:
        yield sums
    finally:
        for handle in handles:
            handle.remove()


def _columns(projection: nn.Linear, square_sum: Tensor) -> Tensor:
    """Return mean over rows of |W_ij| * sqrt(s_j), (inputs,) float64."""
    return projection.weight.abs().mean(dim=0, dtype=torch.float64) * square_sum.sqrt()


def _kept(
    task: Task, index: int, groups: tuple[float, ...], queries: tuple[float, ...], neurons: tuple[float, ...]
) -> dict[str, Tensor] | None:
    """Return a 0/1 mask of the inputs of o_proj and down_proj after pruning, or None where the block stays whole."""
    if task.towards is None or task.towards.blocks[index] == task.shape.blocks[index]:
        return None
    size, after = task.shape.blocks[index], task.towards.blocks[index]
    masks: dict[str, Tensor] = {}
    if size.kv_heads:
        left = selection.highest(groups, after.kv_heads)
        stay = selection.heads_within(left, size.queries_per_group, after.queries_per_group, queries)
        chosen = torch.zeros(size.query_heads)
        chosen[list(stay)] = 1
        masks["o"] = chosen.repeat_interleave(task.shape.head_dim)
    if size.neurons:
        masks["down"] = torch.zeros(size.neurons)
        masks["down"][list(selection.highest(neurons, after.neurons))] = 1
    return masks


@contextmanager
def masked(projections: dict[str, nn.Linear], masks: dict[str, Tensor]) -> Generator[None]:
    """Zero the cut inputs: the block's output is then exactly that of the sliced block."""

    def hook(mask: Tensor) -> Any:
        return lambda _, inputs: (inputs[0] * mask.to(inputs[0]),)

    handles = [p.register_forward_pre_hook(hook(masks[name])) for name, p in projections.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
