"""Angular distance over runs of blocks (Gromov et al., arXiv 2403.17887, eq. 5): which n blocks in a row turn least.

The method removes the contiguous run l .. l + n - 1 with the smallest d(l, l + n). States are numbered from the
embedding's output, and the last is taken before the final norm; common code starts behind block 0 and ends behind the
norm, which hides the runs at either end or distorts them.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from shortllama.criteria import Measured, Task, trace

NAME = "angular"
UNITS = ("block",)
NEEDS = "calibration"


def score(task: Task) -> Measured:
    """Return d(l, l + 1) of each block, and `runs`: d(l, l + n) by n, as {"n": [d(0, n), d(1, n + 1), ...]}.

    d(l, m) = arccos(cos(x_l, x_m)) / pi on the last token of a sequence, in [0, 1], averaged over sequences; higher =
    keep. One pass; memory beyond the model: the last tokens' L + 1 states of one batch, in float64.
    """
    return trace.score(task, observe(task))


def observe(task: Task) -> trace.Observer:
    """Return what watches a shared pass."""
    return _Angles(task)


class _Angles:
    """Sums over sequences of the angles between all states of the last token: every run's ends, from one token each."""

    def __init__(self, task: Task) -> None:
        self._blocks = len(task.stack)
        self._sequences = task.sequences
        self._last: list[Tensor] = []
        self._sums_SS: Tensor | float = 0.0

    def see(self, passage: trace.Passage) -> None:
        """Keep the last token's state; behind the last block, measure the batch and let go of it."""
        if passage.block == 0:
            self._last = [passage.before_BTD[:, -1].double()]
        self._last.append(passage.after_BTD[:, -1].double())
        if passage.block == self._blocks - 1:
            states_BSD = torch.stack([state_BD.to(self._last[0].device) for state_BD in self._last], dim=1)
            self._sums_SS += distances(states_BSD) * len(states_BSD)
            self._last = []

    def measured(self) -> Measured:
        """Return the means: of neighbours as the blocks' scores, of all pairs as `runs`."""
        assert isinstance(self._sums_SS, Tensor), "no batch was seen"
        mean_SS = self._sums_SS / self._sequences
        runs = {str(n): tuple(mean_SS.diagonal(n).tolist()) for n in range(1, self._blocks + 1)}
        return Measured(blocks=runs["1"], runs=runs)


def distances(states_NSD: Tensor) -> Tensor:
    """Return the mean angles (S, S) between the S states of each sequence, in units of pi.

    The cosine of equal vectors may come out above 1, whose arccos is NaN: it is clamped. A zero vector is at 1/2.
    """
    unit_NSD = torch.nn.functional.normalize(states_NSD, dim=-1)
    cosine_NSS = (unit_NSD @ unit_NSD.transpose(1, 2)).clamp(-1, 1)
    return cosine_NSS.arccos().mean(dim=0) / math.pi
