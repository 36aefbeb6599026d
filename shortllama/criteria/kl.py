"""How far the model's predictions move with one part removed: KL divergence of dense to pruned next-token
distributions, in nats.

A forward-only criterion beside ppl that needs no true text: it compares with the model instead. 0 for a block that
does nothing, and unlike perplexity it cannot fall when a block goes.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from shortllama.criteria import Measured, Task, removal

NAME = "kl"
UNITS = ("block", "module")
NEEDS = "calibration"


def score(task: Task) -> Measured:
    """Return mean over all positions of KL(dense || without the block or module), in nats; higher = keep.

    `details` as those of ppl: `dense` (0, or in an iterative run what is gone already costs), `interval`,
    `sequence_kl` (summed over the positions of each sequence), `sequence_tokens` (positions).
    """
    return removal.measured(task, removal.measure(task, divergence), "sequence_kl", np.asarray)


def divergence(dense_BTV: Tensor, _: Tensor) -> Callable[[Tensor], Tensor]:
    """Return logits (B, T, V) -> sum over V of p (log p - log q) as (B, T); p are the dense probabilities.

    Keeps log p, at least in float32; log q and p exist for one sequence at a time.
    """
    wide = torch.promote_types(dense_BTV.dtype, torch.float32)
    dense_log_BTV = torch.log_softmax(dense_BTV.to(wide), dim=-1)

    def compare(logits_BTV: Tensor) -> Tensor:
        pairs = zip(dense_log_BTV, logits_BTV, strict=True)
        return torch.stack(
            [_divergence(log_TV, torch.log_softmax(other_TV.to(wide), dim=-1)) for log_TV, other_TV in pairs]
        )

    return compare


def _divergence(log_p_TV: Tensor, log_q_TV: Tensor) -> Tensor:
    return (log_p_TV.exp() * (log_p_TV - log_q_TV)).sum(dim=-1)
