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
UNITS = ("block", "module")
NEEDS = "calibration"


def score(task: Task) -> Measured:
    """Return exp(mean NLL over all predicted tokens) without each block or module, in nats; higher = keep.

    `details`: `dense` (nothing left out), `interval` (a 95 % bootstrap interval over sequences for each part),
    `sequence_nll` (the summed NLL of each sequence without each part), `sequence_tokens` (predicted tokens). By module,
    interval and sequence_nll hold `attention` and `mlp`, null where a block has none.
    """
    return removal.measured(task, removal.measure(task, _nll), "sequence_nll", perplexity)


def _nll(_: Tensor, ids_BT: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda logits_BTV: token_nll(logits_BTV, ids_BT)


def perplexity(mean_nll: np.ndarray | float) -> np.ndarray:
    """The exponential, infinite without a warning where it overflows: `check_finite` then says it in words."""
    with np.errstate(over="ignore"):
        return np.exp(mean_nll)
