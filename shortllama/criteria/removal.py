"""What the model's output loses when one part is left out: the loop that the forward criteria ppl and kl share.

The hidden state entering each block is cached by one pass, and leaving block n out resumes at block n + 1: exactly
L (L - 1) / 2 + L block passes a batch instead of the L (L - 1) of rebuilding the model for every block, with the same
numbers. Memory beyond the model: L + 1 hidden states of one batch, and the logits that a comparison keeps.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from shortllama.criteria import Task

LEVEL = 0.95
RESAMPLES = 1000

# From the dense logits (B, T, V) and ids (B, T) of a batch: how to measure other logits, position by position (B, P).
Comparison = Callable[[Tensor, Tensor], Callable[[Tensor], Tensor]]


@dataclass(frozen=True)
class Losses:
    """Sums over positions: `dense_N` of each sequence, `without_LN` with each block left out; `positions_N` counts."""

    dense_N: np.ndarray
    without_LN: np.ndarray
    positions_N: np.ndarray

    @property
    def dense(self) -> float:
        """The mean over all positions with nothing left out."""
        return float(self.dense_N.sum() / self.positions_N.sum())

    @property
    def without_L(self) -> np.ndarray:
        """The mean over all positions without each block."""
        return self.without_LN.sum(axis=1) / self.positions_N.sum()


@torch.no_grad()
def measure(task: Task, comparison: Comparison) -> Losses:
    """Return what `comparison` measures on the dense logits, and on those without each block, by sequence."""
    blocks, total = len(task.stack), task.sequences * (len(task.stack) + 1)
    without_LN = np.zeros((blocks, task.sequences))
    dense_N, positions_N = np.zeros(task.sequences), np.zeros(task.sequences, dtype=np.int64)
    first = done = 0
    for ids_BT in task.batches():
        rows = slice(first, first + len(ids_BT))
        states, logits_BTV = task.stack.trace(ids_BT)
        compare = comparison(logits_BTV, ids_BT)
        values_BP = compare(logits_BTV)
        del logits_BTV
        dense_N[rows], positions_N[rows] = _sums(values_BP), values_BP.shape[1]
        for block in range(blocks):
            done += len(ids_BT)
            task.progress(done, total)
            logits_BTV = task.stack.resume(ids_BT, states[block], at=block + 1)
            without_LN[block, rows] = _sums(compare(logits_BTV))
        done += len(ids_BT)
        task.progress(done, total)
        first = rows.stop
    return Losses(dense_N, without_LN, positions_N)


def interval(sums_LN: np.ndarray, positions_N: np.ndarray, *, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the low and high ends (L,) of the percentile bootstrap interval of the mean over sequences.

    All blocks share the resamples, so that their intervals move together. `sums_LN` holds sums, not means.
    """
    sequences = len(positions_N)
    counts_RN = np.random.default_rng(seed).multinomial(sequences, [1 / sequences] * sequences, size=RESAMPLES)
    mean_LR = (sums_LN @ counts_RN.T) / (counts_RN @ positions_N)
    low_L, high_L = np.quantile(mean_LR, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=1)
    return low_L, high_L


def interval_of(losses: Losses, seed: int, scale: Callable[[np.ndarray], np.ndarray]) -> list[list[float]] | None:
    """Return [low, high] for each block in the units of `scale`, a rising function; None for one sequence."""
    if len(losses.positions_N) == 1:
        return None
    ends = interval(losses.without_LN, losses.positions_N, seed=seed)
    return np.stack([scale(end_L) for end_L in ends], axis=1).tolist()


def _sums(values_BP: Tensor) -> np.ndarray:
    return values_BP.sum(dim=1, dtype=torch.float64).cpu().numpy()
