"""Perplexity of the calibration text with one block removed (Shortened LLaMA sec. 3.1, arXiv 2402.02834).

The published code builds a new model for every block and runs it whole: L (L - 1) block passes. Here the hidden state
entering each block is cached once, and removing block n resumes at block n + 1: exactly L (L - 1) / 2 + L passes a
batch, with the same numbers. Memory beyond the model: L + 1 hidden states of one batch.
"""

from __future__ import annotations

import numpy as np
import torch

from shortllama.criteria import Measured, Task
from shortllama.stack import token_nll

NAME = "ppl"
UNIT = "block"
NEEDS = "calibration"

LEVEL = 0.95
RESAMPLES = 1000


@torch.no_grad()
def score(task: Task) -> Measured:
    """Return exp(mean NLL over all predicted tokens) without each block, in nats; higher = keep.

    `details`: `dense` (nothing removed), `interval` (a 95 % bootstrap interval over sequences for each block),
    `sequence_nll` (L lists: the summed NLL of each sequence without that block), `sequence_tokens` (predicted tokens).
    """
    blocks, total = len(task.stack), task.sequences * (len(task.stack) + 1)
    nll_LN = np.zeros((blocks, task.sequences))
    dense_N, tokens_N = np.zeros(task.sequences), np.zeros(task.sequences, dtype=np.int64)
    first = done = 0
    for ids_BT in task.batches():
        rows = slice(first, first + len(ids_BT))
        states, logits_BTV = task.stack.trace(ids_BT)
        tokens_N[rows] = ids_BT.shape[1] - 1
        dense_N[rows] = _sums(logits_BTV, ids_BT)
        del logits_BTV
        for block in range(blocks):
            done += len(ids_BT)
            task.progress(done, total)
            nll_LN[block, rows] = _sums(task.stack.resume(ids_BT, states[block], at=block + 1), ids_BT)
        done += len(ids_BT)
        task.progress(done, total)
        first = rows.stop
    low_L, high_L = interval(nll_LN, tokens_N, seed=task.seed)
    details = {
        "dense": float(_perplexity(dense_N.sum() / tokens_N.sum())),
        "interval": np.stack([low_L, high_L], axis=1).tolist() if task.sequences > 1 else None,
        "sequence_nll": nll_LN.tolist(),
        "sequence_tokens": tokens_N.tolist(),
    }
    return Measured(blocks=tuple(_perplexity(nll_LN.sum(axis=1) / tokens_N.sum()).tolist()), details=details)


def interval(nll_LN: np.ndarray, tokens_N: np.ndarray, *, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the low and high ends (L,) of the percentile bootstrap interval of perplexity over sequences.

    All blocks share the resamples, so that their intervals move together. `nll_LN` holds sums, not means.
    """
    sequences = len(tokens_N)
    counts_RN = np.random.default_rng(seed).multinomial(sequences, [1 / sequences] * sequences, size=RESAMPLES)
    mean_LR = (nll_LN @ counts_RN.T) / (counts_RN @ tokens_N)
    low_L, high_L = np.quantile(mean_LR, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=1)
    return _perplexity(low_L), _perplexity(high_L)


def _sums(logits_BTV: torch.Tensor, ids_BT: torch.Tensor) -> np.ndarray:
    return token_nll(logits_BTV, ids_BT).sum(dim=1, dtype=torch.float64).cpu().numpy()


def _perplexity(mean_nll: np.ndarray) -> np.ndarray:
    """The exponential, infinite without a warning where it overflows: `check_finite` then says it in words."""
    with np.errstate(over="ignore"):
        return np.exp(mean_nll)
