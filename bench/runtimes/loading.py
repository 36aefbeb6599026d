"""What every measured runtime does before its first cell: the subject's model on the device, and its prompt tokens.

One path for random and real weights, so that a comparison of subjects compares shapes and not loaders.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

import torch

from bench import budget, outcomes
from bench.runtimes.protocol import Options, OutOfMemory
from bench.subjects import Subject
from shortllama import checkpoint, surgery
from shortllama.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

P = ParamSpec("P")
R = TypeVar("R")


def allocating(function: Callable[P, R]) -> Callable[P, R]:
    """Let `function` raise OutOfMemory where an allocation failed, whatever torch or a library calls that.

    The original exception is dropped before the new one is raised: its traceback would keep the tensors alive.
    """

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return function(*args, **kwargs)
        except (RuntimeError, MemoryError) as error:
            text = f"{type(error).__name__}: {error}"
            if not outcomes.is_out_of_memory(text, limited=budget.is_limited()):
                raise
        raise OutOfMemory(outcomes.one_line(text))

    return run


@allocating
def load(subject: Subject, options: Options) -> tuple[PreTrainedModel, Any]:
    """Return (model, tokenizer or None) in eval mode on the device, with as many parameters as the subject's shape."""
    if subject.folder is None:
        model = surgery.build(
            subject.shape, dtype=options.dtype, device=options.device, seed=options.seed, attention=options.attention
        )
        tokenizer = None
    else:
        folder = Path(subject.folder)
        where = folder if folder.is_dir() else subject.folder
        model, tokenizer = checkpoint.load(
            where, dtype=options.dtype, device=options.device, attention=options.attention
        )
    held = sum(parameter.numel() for parameter in model.parameters())
    if held != subject.shape.parameters:
        raise InputError(
            f"subject {subject.name}: the loaded model holds {held:,} parameters, its shape says "
            f"{subject.shape.parameters:,}; is {subject.folder} the checkpoint it was planned from?"
        )
    return model.eval(), tokenizer


def warm_up(subject: Subject) -> None:
    """Load what loading the subject brings into the process beside its weights: the tokenizer's library, above all.

    Several MiB that no device would hold: a memory pass has them before its baseline. What cannot be loaded is left
    for `load` to report.
    """
    if subject.folder is not None:
        from transformers import AutoTokenizer

        with contextlib.suppress(OSError, ValueError, KeyError, ImportError):
            AutoTokenizer.from_pretrained(subject.folder)


def random_prompt(vocabulary: int, batch: int, prompt: int, options: Options) -> torch.Tensor:
    """Return seeded random tokens (B, T) on the device; the first sequences are the same at every batch."""
    generator = torch.Generator().manual_seed(options.seed)
    return torch.randint(vocabulary, (batch, prompt), generator=generator).to(options.device)
