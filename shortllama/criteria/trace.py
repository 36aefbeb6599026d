"""One forward pass over the calibration, seen between the blocks: shared by bi, relative-magnitude, norm and angular.

The output of the last block is taken before the final norm (`hidden_states[-1]` of transformers is after it, and would
make the last block look important). The output head does not run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise

import torch
from torch import Tensor

from shortllama.criteria import Task

# From what enters and what leaves a block, both (B, T, D) and at least float32, to one value a token (B, T).
Change = Callable[[Tensor, Tensor], Tensor]


@torch.no_grad()
def states(task: Task) -> Iterator[list[Tensor]]:
    """Yield the L + 1 hidden states (B, T, D) of each batch, at least in float32, and report progress."""
    done = 0
    for ids_BT in task.batches():
        found = task.stack.states(ids_BT)
        yield [state.to(torch.promote_types(state.dtype, torch.float32)) for state in found]
        done += len(ids_BT)
        task.progress(done, task.sequences)


@torch.no_grad()
def mean_change(task: Task, change: Change) -> tuple[float, ...]:
    """Return, for each block, the mean of `change` over all tokens of all sequences."""
    total_L = torch.zeros(len(task.stack), dtype=torch.float64)
    tokens = 0
    for found in states(task):
        for block, (before_BTD, after_BTD) in enumerate(pairwise(found)):
            total_L[block] += change(before_BTD, after_BTD).sum(dtype=torch.float64).item()
        tokens += found[0].shape[0] * found[0].shape[1]
    return tuple((total_L / tokens).tolist())


def cosine(left_BTD: Tensor, right_BTD: Tensor) -> Tensor:
    """Return (B, T) cosines; 0 where a vector is zero."""
    return torch.nn.functional.cosine_similarity(left_BTD, right_BTD, dim=-1)
