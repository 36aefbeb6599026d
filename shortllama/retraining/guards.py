"""What surrounds a stage of retraining: torch's random numbers kept, and memory that runs out told in one line."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager

import torch

from shortllama.errors import InputError, ShortllamaError
from shortllama.retraining.recipes import Stage


@contextmanager
def random_kept(device: torch.device) -> Generator[None]:
    """Put torch's random state back afterwards."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        yield


@contextmanager
def memory_told(stage: Stage, longest: int, step: Callable[[], int]) -> Generator[None]:
    """Turn running out of memory into one line that says what to lower."""
    try:
        yield
    except ShortllamaError:
        raise
    except (RuntimeError, MemoryError) as error:
        if not isinstance(error, torch.OutOfMemoryError | MemoryError) and "can't allocate memory" not in str(error):
            raise
        rows = stage.micro_batch
        lower = [f"--micro-batch (now {rows}; it changes no result)"] if rows > 1 else []
        lower += [] if stage.checkpointing else ["give --checkpointing"]
        lower += [f"lower --length (now {stage.length})"]
        lower += ["choose recipe lora"] if stage.trains == "all" and rows == 1 else []
        said = f"lower {', or '.join(lower)}" if rows > 1 else ", or ".join(lower)
        raise InputError(
            f"out of memory at step {step()}, in {rows} sequences of up to {longest} tokens at once; {said}"
        ) from error
