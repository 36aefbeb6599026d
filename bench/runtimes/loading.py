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
from torch.nn import functional

from bench import budget, outcomes
from bench.runtimes.protocol import Options, OutOfMemory
from bench.subjects import Subject
from shortllama import checkpoint, surgery, verification
from shortllama.errors import InputError
from shortllama.shape import ModelShape

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
    """Return (model, tokenizer or None) in eval mode on the device, with as many parameters as the subject's shape.

    Raises VerificationError for real weights whose decoding with a cache is wrong: the speed of wrong output means
    nothing. Under a memory budget that is not looked at again: the few tokens would count against it.
    """
    if subject.folder is None:
        model = surgery.build(
            subject.shape, dtype=options.dtype, device=options.device, seed=options.seed, attention=options.attention
        )
        tokenizer = None
    else:
        folder = Path(subject.folder)
        where = folder if folder.is_dir() else subject.folder
        model, tokenizer = checkpoint.load(
            where,
            dtype=options.dtype,
            device=options.device,
            attention=options.attention,
            quantised=subject.shape.quantised,
        )
    held = sum(parameter.numel() for parameter in model.parameters())
    if held != subject.shape.parameters:
        raise InputError(
            f"subject {subject.name}: the loaded model holds {held:,} parameters, its shape says "
            f"{subject.shape.parameters:,}; is {subject.folder} the checkpoint it was planned from?"
        )
    if subject.folder is not None and not budget.is_limited():
        verification.check_cache(model.eval())
    return model.eval(), tokenizer


# Numbers of rows at which BLAS chooses other kernels, with buffers of other sizes.
_ROWS = tuple(1 << power for power in range(10))


def warm_up(subject: Subject, options: Options) -> None:
    """Bring into the process what running the subject will, beside its weights: code, and the buffers of BLAS.

    Tens of MiB that would otherwise count against a memory budget or not, depending on the cells run before. MKL keeps
    a buffer for every new size of product, so each matrix size is multiplied once with every number of rows; after
    that its pool was seen to grow by less than 1 MiB. The tokenizer's library comes with the tokenizer; one that cannot
    be loaded is left for `load` to report.
    """
    dtype = surgery.torch_dtype(options.dtype)
    with torch.inference_mode():
        for rows, columns in sorted(_matrices(subject.shape)):
            weight = torch.ones(rows, columns, dtype=dtype, device=options.device)
            for tokens in _ROWS:
                functional.linear(weight.new_ones(1, tokens, columns), weight)
    if subject.folder is not None:
        from transformers import AutoTokenizer

        with contextlib.suppress(OSError, ValueError, KeyError, ImportError):
            AutoTokenizer.from_pretrained(subject.folder)


def _matrices(shape: ModelShape) -> set[tuple[int, int]]:
    """The sizes (out, in) of every matrix of a model."""
    sizes = {(shape.vocabulary, shape.hidden)}
    for block in set(shape.blocks):
        for width in (block.query_heads * shape.head_dim, block.kv_heads * shape.head_dim, block.neurons):
            sizes |= {(width, shape.hidden), (shape.hidden, width)} if width else set()
    return sizes


def random_prompt(vocabulary: int, batch: int, prompt: int, options: Options) -> torch.Tensor:
    """Return seeded random tokens (B, T) on the device; the first sequences are the same at every batch."""
    generator = torch.Generator().manual_seed(options.seed)
    return torch.randint(vocabulary, (batch, prompt), generator=generator).to(options.device)
