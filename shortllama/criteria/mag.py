"""Magnitude (Shortened LLaMA sec. 3.1): the sum of absolute weights of a block. Needs no data.

Projections and norms count, biases, embeddings and head do not; nothing is normalised by size (as published).
"""

from __future__ import annotations

import torch

from shortllama.criteria import Measured, Task
from shortllama.criteria.weights import aggregate, by_piece, rows
from shortllama.removals import Piece

NAME = "mag"
UNITS = ("block", "module")
NEEDS = "weights"


@torch.no_grad()
def score(task: Task) -> Measured:
    """Return sum over the matrices and norms of each block or module of |w|, or what is asked for; higher = keep."""
    scores: dict[Piece, float] = {}
    for block in range(len(task.stack)):
        for piece, weights in by_piece(task, block).items():
            values = {name: rows(torch.abs, weight) for name, weight in weights.items()}
            scores[piece] = aggregate(values, task.reductions)
        task.progress(block + 1, len(task.stack))
    return task.measured([scores[piece] for piece in task.pieces], task.reductions.record())
