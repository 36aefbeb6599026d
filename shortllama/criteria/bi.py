"""Block Influence (ShortGPT eq. 1, arXiv 2403.03853): how far a block turns the hidden state of a token."""

from __future__ import annotations

from shortllama.criteria import Measured, Task, trace

NAME = "bi"
UNITS = ("block",)
NEEDS = "calibration"


def score(task: Task) -> Measured:
    """Return 1 - mean over all tokens of cos(input, output) of each block, in [0, 2]; higher = keep. One pass."""
    return Measured(blocks=trace.mean_change(task, lambda before, after: 1 - trace.cosine(before, after)))
