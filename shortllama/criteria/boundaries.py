"""Where hidden states wait between a forward pass and the way back: in memory, or in a file where they are too many.

The way back through L blocks needs what entered each of them, N * T * D values a block: 67 GB for 1000 sequences of 128
tokens at 7B in float32. They are kept in the precision in which they were computed (16 bits of a 16-bit model), so that
scores do not depend on where they wait: in memory while all of them fit `memory.STATES_BYTES`, else in a temporary file
that has no name, which is gone with the process however it ends. Both are one piece: thousands of small tensors would
leave holes. The file is written and read plainly: pages of a mapped one would count as memory of the process.

Legend: N sequences, T tokens, D hidden, L blocks.
"""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Hashable
from contextlib import ExitStack
from typing import Any, NamedTuple, Protocol, cast

import torch
from torch import Tensor

from shortllama.criteria import memory
from shortllama.errors import InputError

# Every state begins at a multiple of this, so that its values are where their type wants them.
_ALIGNMENT = 64


class Boundaries:
    """Up to `count` states of `size` bytes together, by keys of the caller's choice. The last state of a key counts.

    What is read in memory is a view, which the next state under its key overwrites. Use it in `with`, which lets go of
    them all. Raises InputError where a file is needed, and the folder of temporary files has no room for it or cannot
    be written.
    """

    def __init__(self, size: int, count: int, device: torch.device) -> None:
        self._places: dict[Hashable, _Place] = {}
        self._end = 0
        self._device = device
        room = size + count * _ALIGNMENT
        self._medium: _Medium = _InMemory(room, device) if size <= memory.STATES_BYTES else _InFile(room)

    def __enter__(self) -> Boundaries:
        return self

    def __exit__(self, *_: object) -> None:
        self._medium.close()

    def __setitem__(self, key: Hashable, state: Tensor) -> None:
        place = self._places.get(key)
        if place is None:
            place = self._places[key] = _Place(self._end, state.shape, state.dtype)
            self._end += -(-state.nbytes // _ALIGNMENT) * _ALIGNMENT
        assert place[1:] == (state.shape, state.dtype), "what has the same key has the same size"
        self._medium.write(place, state.detach())

    def __getitem__(self, key: Hashable) -> Tensor:
        return self._medium.read(self._places[key]).to(self._device)


class _Place(NamedTuple):
    offset: int
    shape: torch.Size
    dtype: torch.dtype


class _Medium(Protocol):
    def write(self, place: _Place, state: Tensor) -> None: ...

    def read(self, place: _Place) -> Tensor: ...

    def close(self) -> None: ...


class _InMemory:
    def __init__(self, size: int, device: torch.device) -> None:
        self._bytes = torch.empty(size, dtype=torch.uint8, device=device)

    def write(self, place: _Place, state: Tensor) -> None:
        self.read(place).copy_(state)

    def read(self, place: _Place) -> Tensor:
        size = place.shape.numel() * place.dtype.itemsize
        return self._bytes[place.offset : place.offset + size].view(place.dtype).view(place.shape)

    def close(self) -> None:
        self._bytes = torch.empty(0, dtype=torch.uint8)


class _InFile:
    def __init__(self, size: int) -> None:
        folder = tempfile.gettempdir()
        try:
            # Unbuffered: what passes through is large.
            self._file: Any = tempfile.TemporaryFile(buffering=0, dir=folder)
            with ExitStack() as failed:
                failed.callback(self._file.close)
                os.posix_fallocate(self._file.fileno(), 0, size)
                failed.pop_all()
        except OSError as error:
            why = "has too little room" if error.errno == errno.ENOSPC else f"cannot be used ({error.strerror})"
            raise InputError(
                f"{size / 2**30:.1f} GiB of hidden states go to a temporary file, and {folder} {why}; "
                "set TMPDIR to a folder with room, or give fewer or shorter samples"
            ) from error

    def write(self, place: _Place, state: Tensor) -> None:
        data = _bytes_of(state.cpu().contiguous())
        self._file.seek(place.offset)
        while data:
            data = data[self._file.write(data) :]

    def read(self, place: _Place) -> Tensor:
        state = torch.empty(place.shape, dtype=place.dtype)
        data = _bytes_of(state)
        self._file.seek(place.offset)
        while data:
            count = self._file.readinto(data)
            assert count, "the file holds what was written"
            data = data[count:]
        return state

    def close(self) -> None:
        self._file.close()


def _bytes_of(state: Tensor) -> memoryview:
    return memoryview(cast("Any", state.view(-1).view(torch.uint8).numpy()))
