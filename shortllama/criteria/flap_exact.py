"""FLAP with the variance that its paper defines: unbiased, over all tokens of all sequences (arXiv 2312.11983, eq. 5).

Everything else is `flap`'s; planning also prices heads exactly (see `width_rules`). Means weigh every token alike,
which differs from `flap` only where sequences differ in length.
"""

from __future__ import annotations

import torch
from torch import Tensor

from shortllama.criteria import Measured, Task
from shortllama.criteria.flap import measure

NAME = "flap-exact"
UNITS = ("width",)
NEEDS = "calibration"


class Exact:
    """Mean and variance by Chan's pairwise update of Welford's algorithm; `square_C` as in `flap`."""

    def __init__(self, channels: int, device: torch.device) -> None:
        self.mean_C, self.square_C, self.deviations_C = torch.zeros(3, channels, dtype=torch.float64, device=device)
        self.sequences = self.tokens = 0

    @property
    def fluctuation_C(self) -> Tensor:
        """The unbiased variance of each channel."""
        return self.deviations_C / max(self.tokens - 1, 1)

    def add(self, x_TC: Tensor) -> None:
        """Take the inputs of one more sequence."""
        mean_C, before, new = x_TC.mean(dim=0), self.tokens, len(x_TC)
        self.tokens += new
        self.sequences += 1
        moved_C = mean_C - self.mean_C
        self.mean_C = self.mean_C + moved_C * (new / self.tokens)
        inside_C = (x_TC - mean_C).square().sum(dim=0)
        self.deviations_C = self.deviations_C + inside_C + moved_C.square() * (before * new / self.tokens)
        k = self.sequences
        self.square_C = self.square_C * ((k - 1) / k) + x_TC.square().sum(dim=0) / k


def score(task: Task) -> Measured:
    """Return scores of each block's KV groups and neurons, comparable within a block; higher = keep."""
    return measure(task, Exact)
