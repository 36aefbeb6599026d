"""What a stage minimizes, as a sum over predicted tokens: cross-entropy, or the divergence from a dense teacher.

Sums, so that the parts of a batch add up to it however it is divided. All are in nats, computed in float32.

Legend: B sequences, T tokens, V vocabulary, D hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from shortllama.errors import InputError
from shortllama.families import adapter
from shortllama.stack import Stack, token_nll

# objective(model, ids (B, T), counted (B, T) bool) -> the sum over counted tokens, a float32 scalar
Objective = Callable[[Any, Tensor, Tensor], Tensor]


def tokens(model: Any, ids_BT: Tensor, counts_BT: Tensor) -> Tensor:
    """Return the summed cross-entropy of the counted tokens."""
    nll_BT = token_nll(model(input_ids=ids_BT, use_cache=False).logits, ids_BT)
    return (nll_BT * counts_BT[:, 1:]).sum()


@dataclass(frozen=True)
class Teacher:
    """A dense model in eval mode, its name, and which of its blocks each block of the student was."""

    model: Any
    name: str
    blocks: Sequence[int]

    def check(self, student: Any) -> None:
        """Raise InputError unless this teacher can teach `student`."""
        mine, its = (len(adapter(one).embedding.weight) for one in (self.model, student))
        if mine != its:
            raise InputError(
                f"teacher {self.name} has a vocabulary of {mine}, the student {its}; they must be the same"
            )


def divergence(teacher: Teacher, temperature: float, hidden: float) -> Objective:
    """Return the objective temperature² KL(teacher || student), both softened, plus `hidden` times a hidden-state loss.

    That is the squared error relative to the teacher's squared norm, mean over the student's blocks: what leaves a
    block is compared with what entered, in the teacher, the block that comes next in the student (or its final norm),
    so that each kept block learns to see what it saw when others stood before it. Source: Hinton et al. 2015
    (arXiv 1503.02531) for the softened divergence.
    """
    known = Stack(teacher.model, tuple(adapter(teacher.model).blocks))
    entered = [*teacher.blocks[1:], len(known)]

    def objective(model: Any, ids_BT: Tensor, counts_BT: Tensor) -> Tensor:
        # Frozen weights under autocast would be cast again in each pass; the teacher's are in the type it computes in.
        with torch.no_grad(), torch.autocast(ids_BT.device.type, enabled=False):
            states, logits_BTV = known.trace(ids_BT) if hidden else ([], _logits(teacher.model, ids_BT))
            told_BTV = (logits_BTV[:, :-1].float() / temperature).log_softmax(-1)
        if hidden:
            own_states, logits_BTV = Stack(model, tuple(adapter(model).blocks)).trace(ids_BT)
        else:
            own_states, logits_BTV = [], _logits(model, ids_BT)
        own_BTV = (logits_BTV[:, :-1].float() / temperature).log_softmax(-1)
        found_BT = temperature**2 * (told_BTV.exp() * (told_BTV - own_BTV)).sum(-1)
        for own_BTD, at in zip(own_states[1:], entered if hidden else [], strict=True):
            error_BT = (own_BTD - states[at])[:, :-1].float().square().sum(-1)
            found_BT = found_BT + hidden / len(entered) * error_BT / states[at][:, :-1].float().square().sum(-1)
        return (found_BT * counts_BT[:, 1:]).sum()

    return objective


def _logits(model: Any, ids_BT: Tensor) -> Tensor:
    return model(input_ids=ids_BT, use_cache=False).logits
