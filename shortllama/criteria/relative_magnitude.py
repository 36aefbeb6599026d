"""Relative magnitude (ShortGPT sec. 4, arXiv 2403.03853): how large a block's update is in what it puts out."""

from __future__ import annotations

from shortllama.criteria import Measured, Task, trace

NAME = "relative-magnitude"
UNITS = ("block",)
NEEDS = "calibration"


def score(task: Task) -> Measured:
    """Return mean over all tokens of ||f(x)|| / ||x + f(x)|| of each block; higher = keep. One pass.

    f is the block's residual update, output minus input.
    """
    return trace.score(task, observe(task))


def observe(task: Task) -> trace.Observer:
    """Return what watches a shared pass."""
    return trace.MeanChange(task, lambda passage: passage.update_norm_BT / passage.after_norm_BT)
