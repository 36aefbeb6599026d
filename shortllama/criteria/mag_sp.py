"""Structured magnitude: column norms of o_proj and down_proj (the Mag-sp baseline of FLAP, arXiv 2312.11983).

Needs no data.
"""

from __future__ import annotations

import torch
from torch import nn

from shortllama.criteria import Measured, Task
from shortllama.criteria.weights import floats, per_group

NAME = "mag-sp"
UNITS = ("width",)
NEEDS = "weights"


@torch.no_grad()
def score(task: Task) -> Measured:
    """Return the L2 norm of each column of down_proj (neurons), and of o_proj summed over a KV group; higher = keep.

    Query heads have the sum of their own columns. Scores are comparable within one block.
    """
    groups: list[tuple[float, ...]] = []
    queries: list[tuple[float, ...]] = []
    neurons: list[tuple[float, ...]] = []
    for block, size in zip(task.adapter.blocks, task.shape.blocks, strict=True):
        projections = task.adapter.projections(block)
        columns = _norms(projections["o"]) if size.kv_heads else torch.zeros(0)
        groups.append(floats(per_group(columns, size.kv_heads)))
        queries.append(floats(per_group(columns, size.query_heads)))
        neurons.append(floats(_norms(projections["down"])) if size.neurons else ())
        task.progress(len(groups), len(task.stack))
    return Measured(kv_groups=tuple(groups), neurons=tuple(neurons), query_heads=tuple(queries))


def _norms(projection: nn.Linear) -> torch.Tensor:
    wide = torch.promote_types(projection.weight.dtype, torch.float32)
    return projection.weight.to(wide).norm(dim=0)
