"""Block Influence (ShortGPT eq. 1, arXiv 2403.03853): how far a block turns the hidden state of a token."""

from __future__ import annotations

import torch
from torch import Tensor

from shortllama.criteria import Measured, Task, trace

NAME = "bi"
UNITS = ("block",)
NEEDS = "calibration"


def score(task: Task) -> Measured:
    """Return 1 - mean over all tokens of cos(input, output) of each block, in [0, 2]; higher = keep. One pass."""
    return trace.score(task, observe(task))


def observe(task: Task) -> trace.Observer:
    """Return what watches a shared pass."""
    return trace.MeanChange(task, turn)


def turn(passage: trace.Passage) -> Tensor:
    """Return 1 - cos(x, y) of each token (B, T), with f = y - x, as (||f||^2 - (||y|| - ||x||)^2) / (2 ||x|| ||y||).

    The law of cosines takes norms alone, and keeps its precision where a block turns almost nothing, which is where
    ranks are decided; 1 minus a cosine loses it there. Where a vector is zero the cosine counts as 0.
    """
    longer_BT = passage.after_norm_BT - passage.before_norm_BT
    turned_BT = (passage.update_norm_BT - longer_BT) * (passage.update_norm_BT + longer_BT)
    both_BT = 2 * passage.before_norm_BT * passage.after_norm_BT
    return torch.where(both_BT == 0, 1.0, (turned_BT / both_BT).clamp(0, 2))
