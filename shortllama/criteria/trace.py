"""One forward pass over the calibration, watched between the blocks: what bi, relative-magnitude, norm, angular share.

However many of them are asked for, the pass is made once (`score_together`). A criterion file exports `observe(task)`
beside its score: what it makes of each block's passage. Only the state that entered a block is kept until the next one
has left it. The output of the last block is taken before the final norm (`hidden_states[-1]` of transformers is after
it, and would make the last block look important). The output head does not run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Protocol, cast

import torch
from torch import Tensor

from shortllama.criteria import Criterion, Measured, Task


class Passage:
    """What entered and what left block `block` for one batch, both (B, T, D) and at least float32; norms on demand.

    Norms are summed in float64 and made once for all observers; that of an output is handed on to the next block.
    """

    def __init__(self, block: int, before_BTD: Tensor, after_BTD: Tensor, previous: Passage | None) -> None:
        self.block = block
        self.before_BTD = before_BTD
        self.after_BTD = after_BTD
        known = {} if previous is None else vars(previous)
        if "after_norm_BT" in known:
            self.before_norm_BT = known["after_norm_BT"]

    @cached_property
    def before_norm_BT(self) -> Tensor:
        """||x||, float64."""
        return _norm(self.before_BTD)

    @cached_property
    def after_norm_BT(self) -> Tensor:
        """||x + f(x)||, float64."""
        return _norm(self.after_BTD)

    @cached_property
    def update_norm_BT(self) -> Tensor:
        """||f(x)||, float64: what the block adds to the residual stream."""
        return _norm(self.after_BTD - self.before_BTD)


def _norm(state_BTD: Tensor) -> Tensor:
    return torch.linalg.vector_norm(state_BTD, dim=-1, dtype=torch.float64)


class Observer(Protocol):
    """What a criterion makes of the passages of one pass: each batch's blocks in order, batch after batch."""

    def see(self, passage: Passage) -> None:
        """Take one block's passage; it must not be kept, nor changed."""
        ...

    def measured(self) -> Measured:
        """Return the scores, after the pass."""
        ...


class MeanChange:
    """The mean over all tokens of all sequences of `change`, which gives one value a token (B, T), for each block."""

    def __init__(self, task: Task, change: Callable[[Passage], Tensor]) -> None:
        self._change = change
        # Sums stay on the device of their block: reading them there would wait for the pass.
        self._sums: list[Tensor | float] = [0.0] * len(task.stack)
        assert task.calibration is not None, "the criterion needs calibration and got none"
        self._tokens = task.calibration.tokens

    def see(self, passage: Passage) -> None:
        """Add the batch's tokens."""
        self._sums[passage.block] += self._change(passage).sum(dtype=torch.float64)

    def measured(self) -> Measured:
        """Return the means as scores by block."""
        return Measured(blocks=tuple(float(total) / self._tokens for total in self._sums))


class Traced(Criterion, Protocol):
    """A criterion that watches a pass instead of making its own."""

    def observe(self, task: Task) -> Observer:
        """Return a new observer for the task."""
        ...


@torch.no_grad()
def watch(task: Task, observers: Sequence[Observer]) -> list[Measured]:
    """Return what each observer measured in one pass over the calibration. Reports progress by sequences."""
    done = 0
    for ids_BT in task.batches():
        _watch_batch(task, ids_BT, observers)
        done += len(ids_BT)
        task.progress(done, task.sequences)
    return [observer.measured() for observer in observers]


def _watch_batch(task: Task, ids_BT: Tensor, observers: Sequence[Observer]) -> None:
    entered: Tensor | None = None
    passage: Passage | None = None

    def take(state: Tensor) -> None:
        nonlocal entered, passage
        state_BTD = state.to(torch.promote_types(state.dtype, torch.float32))
        if entered is not None:
            block = 0 if passage is None else passage.block + 1
            passage = Passage(block, entered, state_BTD, passage)
            for observer in observers:
                observer.see(passage)
        entered = state_BTD

    task.stack.watch(ids_BT, take)


def score(task: Task, observer: Observer) -> Measured:
    """Return what a single observer measures."""
    return watch(task, [observer])[0]


def score_together(task: Task, chosen: Sequence[Criterion]) -> list[Measured]:
    """Return what each of several traced criteria measures, from one pass."""
    return watch(task, [cast("Traced", one).observe(task) for one in chosen])
