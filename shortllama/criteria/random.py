"""Random scores: the baseline every criterion must beat. Needs no data and no weights."""

from __future__ import annotations

import numpy as np

from shortllama.criteria import Measured, Task

NAME = "random"
UNITS = ("block",)
NEEDS = "nothing"


def score(task: Task) -> Measured:
    """Return one uniform draw in [0, 1) for each block, the same for the same seed and number of blocks."""
    return Measured(blocks=tuple(np.random.default_rng(task.seed).random(len(task.shape.blocks)).tolist()))
