"""Perplexity of the calibration text with one block removed (Shortened LLaMA sec. 3.1, arXiv 2402.02834).

The published code builds a new model for every block and runs it whole; `removal` resumes from cached hidden states.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from torch import Tensor

from shortllama.criteria import Measured, Task, removal
from shortllama.stack import token_nll

NAME = "ppl"
UNIT = "block"
NEEDS = "calibration"


def score(task: Task) -> Measured:
    """Return exp(mean NLL over all predicted tokens) without each block, in nats; higher = keep.

    `details`: `dense` (nothing removed), `interval` (a 95 % bootstrap interval over sequences for each block),
    `sequence_nll` (L lists: the summed NLL of each sequence without that block), `sequence_tokens` (predicted tokens).
    """
    losses = removal.measure(task, _nll)
    details = {
        "dense": float(perplexity(losses.dense)),
        "interval": removal.interval_of(losses, task.seed, perplexity),
        "sequence_nll": losses.without_LN.tolist(),
        "sequence_tokens": losses.positions_N.tolist(),
    }
    return Measured(blocks=tuple(perplexity(losses.without_L).tolist()), details=details)


def _nll(_: Tensor, ids_BT: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda logits_BTV: token_nll(logits_BTV, ids_BT)


def perplexity(mean_nll: np.ndarray | float) -> np.ndarray:
    """The exponential, infinite without a warning where it overflows: `check_finite` then says it in words."""
    with np.errstate(over="ignore"):
        return np.exp(mean_nll)
