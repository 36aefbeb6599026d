"""Magnitude (Shortened LLaMA sec. 3.1): the sum of absolute weights of a block. Needs no data.

Projections and norms count, biases, embeddings and head do not; nothing is normalised by size (as published).
"""

from __future__ import annotations

import torch

from shortllama.criteria import Measured, Task
from shortllama.criteria.weights import aggregate, rows, scored_weights

NAME = "mag"
UNIT = "block"
NEEDS = "weights"


@torch.no_grad()
def score(task: Task) -> Measured:
    """Return sum over the block's matrices and norms of |w|, or the aggregation asked for; higher = keep."""
    scores: list[float] = []
    for block in task.stack.blocks:
        values = {name: rows(weight.abs()) for name, weight in scored_weights(task.adapter, block).items()}
        scores.append(aggregate(values, task.reductions))
        task.progress(len(scores), len(task.stack))
    return Measured(blocks=tuple(scores), details=task.reductions.record())
