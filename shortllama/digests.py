"""Large files written and digested in one pass, in bounded memory.

The digest is the SHA-256 of the whole file, as `sha256sum` prints it and model hubs record it: anybody can check it. A
second thread computes it while the next pieces are read and written; hashing releases the interpreter's lock.
Written bytes are sent to the disk as they come, so that the final fsync, which is always waited for, has little left to
do and a large file does not fill the machine's memory with pages to be written.
"""

from __future__ import annotations

import hashlib
import os
from collections import deque
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO

from shortllama.errors import InputError

Piece = bytes | bytearray | memoryview

# Large enough that calls cost nothing, small enough that a copy needs no memory worth naming.
CHUNK_BYTES = 4 << 20

# How many pieces may be in memory at a time: being read, written, or waiting to be digested.
PIECES = 4

_SENT_BYTES = 32 << 20


def write_digested(path: Path, pieces: Iterable[Piece]) -> str:
    """Write `pieces` to `path`, wait until they are on the disk, and return the file's SHA-256.

    A piece must stay as it is until PIECES - 1 more have been taken. Raises InputError where the disk is full or not
    writable; what was written by then is the caller's to remove.
    """
    digest = hashlib.sha256()
    waiting: deque[Future[None]] = deque()
    try:
        with ThreadPoolExecutor(1) as beside, path.open("wb", buffering=0) as file:
            written = sent = 0
            for piece in pieces:
                waiting.append(beside.submit(digest.update, piece))
                written += _write(file, piece)
                if written - sent >= _SENT_BYTES:
                    _send(file, sent, written - sent)
                    sent = written
                while len(waiting) >= PIECES:
                    waiting.popleft().result()
            os.fsync(file.fileno())
    except OSError as error:
        raise InputError(f"{path.name}: cannot be written ({error.strerror})") from error
    return digest.hexdigest()


def _write(file: BinaryIO, piece: Piece) -> int:
    """Write all of a piece: a system call may take less than it was given."""
    left = memoryview(piece)
    while left:
        left = left[file.write(left) :]
    return len(piece)


def _send(file: BinaryIO, start: int, count: int) -> None:
    """Start writing a range of the file to the disk without waiting: what Linux does first when told to forget it."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(file.fileno(), start, count, os.POSIX_FADV_DONTNEED)


def digest_of(path: Path) -> str:
    """Return the SHA-256 of a file, read in pieces."""
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while piece := file.read(CHUNK_BYTES):
                digest.update(piece)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error
    return digest.hexdigest()
