"""Taylor with the absolute value taken of a whole tensor: what its weights raise and lower cancels first."""

from __future__ import annotations

from shortllama.criteria import Measured, Task, taylor

NAME = "taylor-vector"
UNITS = ("block", "module")
NEEDS = "calibration"


def score(task: Task) -> Measured:
    """Return the estimator "vector" of `taylor.estimate` for each block (nats); higher = keep."""
    return taylor.estimate(task, taylor.per_tensor, each_sequence=False)
