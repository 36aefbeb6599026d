"""What the model's output loses when one part is left out: the loop that the forward criteria ppl and kl share.

The hidden state entering each block is cached by one pass, and leaving block n out resumes at block n + 1: exactly
L (L - 1) / 2 + L block passes a batch instead of the L (L - 1) of rebuilding the model for every block, with the same
numbers. A module is left out by resuming at its own block. Memory beyond the model: L + 1 hidden states of one batch,
and the logits that a comparison keeps.

Legend: B batch, T tokens, D hidden, V vocabulary, N sequences, P positions measured, U parts left out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from shortllama.criteria import Measured, Task
from shortllama.removals import Piece
from shortllama.stack import left_out

LEVEL = 0.95
RESAMPLES = 1000

# From the dense logits (B, T, V) and ids (B, T) of a batch: how to measure other logits, position by position (B, P).
Comparison = Callable[[Tensor, Tensor], Callable[[Tensor], Tensor]]


@dataclass(frozen=True)
class Losses:
    """Sums over positions: `dense_N` of each sequence, `without_UN` with each part left out; `positions_N` counts."""

    dense_N: np.ndarray
    without_UN: np.ndarray
    positions_N: np.ndarray

    @property
    def dense(self) -> float:
        """The mean over all positions with nothing left out."""
        return float(self.dense_N.sum() / self.positions_N.sum())

    @property
    def without_U(self) -> np.ndarray:
        """The mean over all positions without each part."""
        return self.without_UN.sum(axis=1) / self.positions_N.sum()


@torch.no_grad()
def measure(task: Task, comparison: Comparison) -> Losses:
    """Return what `comparison` measures with nothing left out, and without each of the task's pieces, by sequence.

    What the task's journal holds is not measured again; a batch that it holds whole does not run at all.
    """
    pieces = task.pieces
    total = task.sequences * (len(pieces) + 1)
    without_UN = np.zeros((len(pieces), task.sequences))
    dense_N, positions_N = np.zeros(task.sequences), np.zeros(task.sequences, dtype=np.int64)
    first = done = 0
    for ids_BT in task.batches():
        rows = slice(first, first + len(ids_BT))
        batch = _Batch(task, ids_BT, first, comparison)
        dense_N[rows], positions_N[rows] = batch.dense()
        for number, piece in enumerate(pieces):
            done += len(ids_BT)
            task.progress(done, total)
            without_UN[number, rows] = batch.without(piece)
        done += len(ids_BT)
        task.progress(done, total)
        first = rows.stop
    return Losses(dense_N, without_UN, positions_N)


class _Batch:
    """The losses of one batch, from the journal where it has them. The batch is traced when one is missing."""

    def __init__(self, task: Task, ids_BT: Tensor, first: int, comparison: Comparison) -> None:
        self._task, self._ids_BT, self._first, self._comparison = task, ids_BT, first, comparison
        self._journal = task.journal.part(f"sequence {first}")
        self._traced: tuple[list[Tensor], Callable[[Tensor], Tensor]] | None = None

    def dense(self) -> tuple[list[float], int]:
        """Return the sum of each sequence with nothing left out, and how many positions each has."""
        finished = self._journal.finished("dense")
        # The first step of an iterative run leaves the dense states to the others, finished or not.
        wanted = self._task.kept is not None and self._first not in self._task.kept
        return self._trace() if wanted or finished is None else finished

    def without(self, piece: Piece) -> list[float]:
        """Return the sum of each sequence without a piece."""
        sums_B = self._journal.finished(piece)
        if sums_B is None:
            if self._traced is None:
                self._trace()
            assert self._traced is not None
            states, compare = self._traced
            sums_B = _sums(compare(_without(self._task, self._ids_BT, states, piece)))
            self._journal.keep(piece, sums_B)
        return sums_B

    def _trace(self) -> tuple[list[float], int]:
        """Run the batch with nothing left out; keep the state that enters each block, and what to compare with."""
        task, ids_BT = self._task, self._ids_BT
        states, logits_BTV = task.stack.trace(ids_BT)
        compare = self._comparison(_reference(task, ids_BT, self._first, states[-1], logits_BTV), ids_BT)
        values_BP = compare(logits_BTV)
        self._traced = states, compare
        dense = _sums(values_BP), values_BP.shape[1]
        if self._journal.finished("dense") is None:
            self._journal.keep("dense", dense)
        return dense


def _without(task: Task, ids_BT: Tensor, states: list[Tensor], piece: Piece) -> Tensor:
    """Return the logits (B, T, V) without a piece, from the states that enter the blocks."""
    if piece.part == "block":
        return task.stack.resume(ids_BT, states[piece.block], at=piece.block + 1)
    with left_out(task.adapter, task.stack.blocks[piece.block], piece.part):
        return task.stack.resume(ids_BT, states[piece.block] if piece.block else None, at=piece.block)


def _reference(task: Task, ids_BT: Tensor, key: int, last_BTD: Tensor, logits_BTV: Tensor) -> Tensor:
    """Return the logits of the model before anything was removed.

    An iterative run keeps what left its last block in the first step, and runs the tail on it again: no block passes.
    """
    if task.kept is None:
        return logits_BTV
    dense_BTD = task.kept.setdefault(key, last_BTD)
    return logits_BTV if dense_BTD is last_BTD else task.stack.resume(ids_BT, dense_BTD, at=len(task.stack))


def interval(sums_UN: np.ndarray, positions_N: np.ndarray, *, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the low and high ends (U,) of the percentile bootstrap interval of the mean over sequences.

    All parts share the resamples, so that their intervals move together. `sums_UN` holds sums, not means.
    """
    sequences = len(positions_N)
    counts_RN = np.random.default_rng(seed).multinomial(sequences, [1 / sequences] * sequences, size=RESAMPLES)
    mean_UR = (sums_UN @ counts_RN.T) / (counts_RN @ positions_N)
    low_U, high_U = np.quantile(mean_UR, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=1)
    return low_U, high_U


def measured(task: Task, losses: Losses, name: str, scale: Callable[..., np.ndarray]) -> Measured:
    """Return the scores in the units of `scale`, a rising function, with their intervals and, as `name`, their sums."""
    details: dict[str, Any] = {
        "dense": float(scale(losses.dense)),
        "interval": None,
        name: _listed(task, losses.without_UN.tolist()),
        "sequence_tokens": losses.positions_N.tolist(),
    }
    if len(losses.positions_N) > 1:
        ends = interval(losses.without_UN, losses.positions_N, seed=task.seed)
        details["interval"] = _listed(task, np.stack([scale(end_U) for end_U in ends], axis=1).tolist())
    return task.measured(scale(losses.without_U).tolist(), details)


def _listed(task: Task, values: list[Any]) -> Any:
    lists = task.lay_out(values)
    return lists.get("blocks", lists)


def _sums(values_BP: Tensor) -> list[float]:
    return values_BP.sum(dim=1, dtype=torch.float64).tolist()
