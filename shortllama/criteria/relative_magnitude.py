"""Relative magnitude (ShortGPT sec. 4, arXiv 2403.03853): how large a block's update is in what it puts out."""

from __future__ import annotations

from torch import Tensor

from shortllama.criteria import Measured, Task, trace

NAME = "relative-magnitude"
UNITS = ("block",)
NEEDS = "calibration"


def score(task: Task) -> Measured:
    """Return mean over all tokens of ||f(x)|| / ||x + f(x)|| of each block; higher = keep. One pass.

    f is the block's residual update, output minus input.
    """
    return Measured(blocks=trace.mean_change(task, _share))


def _share(before_BTD: Tensor, after_BTD: Tensor) -> Tensor:
    return (after_BTD - before_BTD).norm(dim=-1) / after_BTD.norm(dim=-1)
