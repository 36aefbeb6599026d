"""Hidden-state norm (compared with in ShortGPT sec. 4, arXiv 2403.03853): blocks where the norm is largest go first.

With norms in front of its modules, a model's hidden state grows from block to block, and each update weighs less in
it. The order is therefore close to removal from the end. That large norms go first is our reading: the published
direction could not be checked against code.
"""

from __future__ import annotations

from shortllama.criteria import Measured, Task, trace

NAME = "norm"
UNITS = ("block",)
NEEDS = "calibration"


def score(task: Task) -> Measured:
    """Return minus the mean over all tokens of ||output|| of each block; higher = keep. One pass."""
    return trace.score(task, observe(task))


def observe(task: Task) -> trace.Observer:
    """Return what watches a shared pass."""
    return trace.MeanChange(task, lambda passage: -passage.after_norm_BT)
