"""Taylor with the absolute value taken by sample: what one sample raises and another lowers does not cancel."""

from __future__ import annotations

from shortllama.criteria import Measured, Task, taylor

NAME = "taylor-sample"
UNITS = ("block", "module")
NEEDS = "calibration"


def score(task: Task) -> Measured:
    """Return the estimator "sample" of `taylor.estimate` for each block (nats); higher = keep."""
    return taylor.estimate(task, taylor.per_weight, each_sequence=True)
