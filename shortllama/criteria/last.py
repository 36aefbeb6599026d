"""Sequential removal from the end: the last blocks go first (ShortGPT sec. 4, "sequential"). Needs no data."""

from __future__ import annotations

from shortllama.criteria import Measured, Task

NAME = "last"
UNITS = ("block",)
NEEDS = "nothing"


def score(task: Task) -> Measured:
    """Return -index for each block, so that the last has the lowest score."""
    return Measured(blocks=tuple(float(-index) for index in range(len(task.shape.blocks))))
