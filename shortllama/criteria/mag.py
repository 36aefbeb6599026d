"""Magnitude (Shortened LLaMA sec. 3.1): the sum of absolute weights of a block. Needs no data.

Projections and norms count, biases, embeddings and head do not; nothing is normalised by size (as published).
"""

from __future__ import annotations

import torch

from shortllama.criteria import Measured, Task
from shortllama.criteria.weights import scored_weights

NAME = "mag"
UNIT = "block"
NEEDS = "weights"


@torch.no_grad()
def score(task: Task) -> Measured:
    """Return sum over the block's matrices and norms of |w|; higher = keep."""
    scores: list[float] = []
    for block in task.adapter.blocks:
        weights = scored_weights(task.adapter, block).values()
        scores.append(sum(weight.abs().sum(dtype=torch.float64).item() for weight in weights))
        task.progress(len(scores), len(task.stack))
    return Measured(blocks=tuple(scores))
