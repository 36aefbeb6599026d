"""What long verbs do about an interruption: they keep what is finished beside the output, and say so."""

from __future__ import annotations

from collections.abc import Generator, Iterable
from contextlib import contextmanager
from pathlib import Path

from shortllama import console, journal


@contextmanager
def resumable(outputs: Iterable[Path | None]) -> Generator[None]:
    """Discard the journals of these outputs once the block has ended well; where it is interrupted, name them."""
    paths = [journal.beside(out) for out in outputs if out is not None]
    try:
        yield
    except KeyboardInterrupt:
        for path in filter(Path.exists, paths):
            console.note(f"{path} keeps what is finished; the same command goes on from there")
        raise
    for path in paths:
        journal.discard(path)
