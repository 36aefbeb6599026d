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
    keep. One pass; memory beyond the model: the last tokens' L + 1 states of all sequences, in float64.
    """
    last = [torch.stack([state[:, -1].double() for state in found], dim=1) for found in trace.states(task)]
    distance_SS = distances(torch.cat(last))
    runs = {str(n): tuple(distance_SS.diagonal(n).tolist()) for n in range(1, len(task.stack) + 1)}
    return Measured(blocks=runs["1"], runs=runs)


def distances(states_NSD: Tensor) -> Tensor:
    """Return the mean angles (S, S) between the S states of each sequence, in units of pi.

    The cosine of equal vectors may come out above 1, whose arccos is NaN: it is clamped. A zero vector is at 1/2.
    """
    unit_NSD = torch.nn.functional.normalize(states_NSD, dim=-1)
    cosine_NSS = (unit_NSD @ unit_NSD.transpose(1, 2)).clamp(-1, 1)
    return cosine_NSS.arccos().mean(dim=0) / math.pi
