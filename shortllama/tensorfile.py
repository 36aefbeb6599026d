"""Safetensors files by hand: headers checked strictly, tensors read and written one after the other.

Why not the safetensors library: it maps whole files (mapped pages count neither against a memory budget nor as
constant memory), and writes only from tensors that are all in memory. The format is eight bytes of header length, a
JSON header, and raw little-endian rows (https://huggingface.co/docs/safetensors). Knows no model; free of torch.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from itertools import cycle
from pathlib import Path
from typing import Any

import msgspec

from shortllama import files
from shortllama.digests import CHUNK_BYTES, PIECES, Piece, write_digested
from shortllama.errors import InputError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"

# The dtypes that weights of this project may have, by their names in the format and in torch.
DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
NAMES = {name: code for code, name in DTYPES.items()}
ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}

# A header of 100 MB is the format's own limit; it also stops a garbage length from being allocated.
_HEADER_LIMIT = 100_000_000


class Stored(msgspec.Struct, frozen=True):
    """A tensor in a file: its dtype code, dimensions, and the bytes [start, end) of the file."""

    file: Path
    code: str
    dimensions: tuple[int, ...]
    start: int
    end: int

    @property
    def row_bytes(self) -> int:
        """The bytes of one row (index along axis 0)."""
        return (self.end - self.start) // self.dimensions[0] if self.dimensions and self.dimensions[0] else 0


def in_folder(folder: Path) -> dict[str, Stored]:
    """Return every tensor of a checkpoint folder, in one file or sharded with an index.

    Raises InputError for pickled or missing weights, a missing shard, and any file that is cut off or corrupt.
    """
    index = folder / INDEX
    if index.is_file():
        return _sharded(folder, index)
    if (folder / SINGLE).is_file():
        return header(folder / SINGLE)
    pickled = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern))
    if pickled:
        raise InputError(
            f"{folder}: holds {pickled[0]} but no safetensors; pickles are never loaded: convert it with "
            "transformers' save_pretrained"
        )
    raise InputError(f"{folder}: no {SINGLE} and no {INDEX}; expected a folder with safetensors weights")


def _sharded(folder: Path, index: Path) -> dict[str, Stored]:
    document = files.decode_json(files.read_bytes(index), dict[str, Any], str(index))
    named = document.get("weight_map")
    if not isinstance(named, dict) or not named:
        raise InputError(f"{index}: no weight_map; was it cut off or edited by hand?")
    found: dict[str, Stored] = {}
    for shard in sorted({str(shard) for shard in named.values()}):
        if Path(shard).name != shard:
            raise InputError(f"{index}: shard {shard!r} is not a plain file name in this folder")
        found |= header(folder / shard)
    lost = [name for name in named if name not in found]
    if lost:
        raise InputError(f"{index}: tensor {lost[0]!r} is not in {named[lost[0]]}; the shards do not belong together")
    return found


def header(path: Path) -> dict[str, Stored]:
    """Return the tensors of one file. Raises InputError unless the header describes the file to its last byte."""
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, _HEADER_LIMIT):
                raise _broken(path, f"{size} bytes, header claims {length}")
            text = file.read(length)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error
    try:
        entries = json.loads(text)
        entries.pop("__metadata__", None)
        found = {name: _stored(path, entry, 8 + length) for name, entry in entries.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise _broken(path, "its header is not readable") from error
    end = 8 + length
    for name, one in sorted(found.items(), key=lambda item: (item[1].start, item[1].end)):
        expected = math.prod(one.dimensions) * ITEM_BYTES[one.code] if one.code in ITEM_BYTES else one.end - one.start
        if one.start != end or one.end - one.start != expected:
            raise _broken(path, f"tensor {name!r} is not where its header says")
        end = one.end
    if end != size:
        raise _broken(path, f"{size} bytes, header describes {end}")
    return found


def _stored(path: Path, entry: dict[str, Any], base: int) -> Stored:
    first, last = entry["data_offsets"]
    dimensions = tuple(int(size) for size in entry["shape"])
    if min((*dimensions, int(first), int(last) - int(first))) < 0:
        raise ValueError("negative size")
    return Stored(path, str(entry["dtype"]), dimensions, base + int(first), base + int(last))


def _broken(path: Path, why: str) -> InputError:
    return InputError(f"{path}: not a whole safetensors file ({why}); copy or download it again")


def rows(one: Stored, chunk_bytes: int = CHUNK_BYTES) -> Iterator[tuple[int, memoryview]]:
    """Yield a tensor's first row number and raw bytes, some whole rows at a time, by plain reads.

    A chunk stays as it is until PIECES - 1 more have been taken: buffers are used in turn.
    """
    if not one.row_bytes:
        return
    step = max(1, chunk_bytes // one.row_bytes)
    count = min(PIECES, -(-one.dimensions[0] // step))
    buffers = cycle([bytearray(min(step, one.dimensions[0]) * one.row_bytes) for _ in range(count)])
    try:
        with one.file.open("rb", buffering=0) as file:
            file.seek(one.start)
            for first in range(0, one.dimensions[0], step):
                wanted = min(step, one.dimensions[0] - first) * one.row_bytes
                chunk = memoryview(next(buffers))[:wanted]
                _read_into(file, chunk, one.file)
                yield first, chunk
    except OSError as error:
        raise InputError(f"{one.file}: cannot be read ({error.strerror})") from error


def cut(
    one: Stored, kept_rows: tuple[int, ...] | None = None, kept_columns: tuple[int, ...] | None = None
) -> Iterator[memoryview]:
    """Yield the bytes of a tensor's kept rows (axis 0) and columns (axis 1), some rows at a time; None keeps all."""
    if kept_rows is None and kept_columns is None:
        yield from (raw for _, raw in rows(one))
        return
    import numpy as np

    wanted = np.arange(one.dimensions[0]) if kept_rows is None else np.asarray(kept_rows, dtype=np.intp)
    for first, raw in rows(one):
        values = np.frombuffer(raw, dtype=f"u{ITEM_BYTES[one.code]}").reshape(len(raw) // one.row_bytes, -1)
        kept = values[wanted[(wanted >= first) & (wanted < first + len(values))] - first]
        if kept_columns is not None:
            kept = kept[:, np.asarray(kept_columns, dtype=np.intp)]
        if kept.size:
            yield np.ascontiguousarray(kept).data.cast("B")


def read(one: Stored, target: memoryview) -> None:
    """Fill `target`, as many bytes as the tensor has, by plain reads."""
    try:
        with one.file.open("rb", buffering=0) as file:
            file.seek(one.start)
            _read_into(file, target, one.file)
    except OSError as error:
        raise InputError(f"{one.file}: cannot be read ({error.strerror})") from error


def _read_into(file: Any, target: memoryview, path: Path) -> None:
    """Fill `target` from an unbuffered file. Raises InputError where the file ends early."""
    done = 0
    while done < len(target):
        count = file.readinto(target[done:])
        if not count:
            raise _broken(path, f"it ended {len(target) - done} bytes early")
        done += count


# -- writing ----------------------------------------------------------------------------------------------------------


class Planned(msgspec.Struct, frozen=True):
    """A tensor to write: name, dtype code, dimensions, and a call that yields its raw bytes in pieces."""

    name: str
    code: str
    dimensions: tuple[int, ...]
    pieces: Callable[[], Iterable[Piece]]

    @property
    def size(self) -> int:
        """The tensor's bytes."""
        return math.prod(self.dimensions) * ITEM_BYTES[self.code]


def write_folder(
    folder: Path, planned: list[Planned], shard_bytes: int, progress: Callable[[int, int], None] | None = None
) -> dict[str, str]:
    """Write tensors as model.safetensors, or as shards of at most `shard_bytes` (or one tensor) with an index.

    Streams: memory is that of a few pieces. `progress(done, total)` counts the tensors' bytes. Returns the SHA-256 of
    each weight file by name. Raises InputError where the disk has no room or is not writable; the caller removes the
    folder.
    """
    total = sum(one.size for one in planned)
    _require_room(folder, total)
    shards = _split(planned, shard_bytes)
    names = (
        [SINGLE]
        if len(shards) == 1
        else [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    )
    digests: dict[str, str] = {}
    done = 0
    for name, shard in zip(names, shards, strict=True):
        pieces = _pieces(shard, _header(shard), done, lambda now: progress(now, total) if progress else None)
        digests[name] = write_digested(folder / name, pieces)
        done += sum(one.size for one in shard)
    if len(shards) > 1:
        located = {one.name: name for name, shard in zip(names, shards, strict=True) for one in shard}
        document = {"metadata": {"total_size": total}, "weight_map": dict(sorted(located.items()))}
        files.write_atomically(folder / INDEX, files.encode_json(document))
    return digests


def _require_room(folder: Path, wanted: int) -> None:
    """Raise InputError where the disk has less room than `wanted` bytes: before the work, not after it."""
    free = shutil.disk_usage(folder).free
    if free < wanted:
        raise InputError(
            f"{folder.parent}: {free:,} bytes are free, the weights need {wanted:,}; make room or give another --out"
        )


def _split(planned: list[Planned], shard_bytes: int) -> list[list[Planned]]:
    shards: list[list[Planned]] = [[]]
    used = 0
    for one in planned:
        if shards[-1] and used + one.size > shard_bytes:
            shards.append([])
            used = 0
        shards[-1].append(one)
        used += one.size
    return shards


def _header(planned: list[Planned]) -> bytes:
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for one in planned:
        entries[one.name] = {"dtype": one.code, "shape": one.dimensions, "data_offsets": [offset, offset + one.size]}
        offset += one.size
    text = json.dumps(entries, separators=(",", ":")).encode()
    # The format asks for 8 bytes; at 64 a reader that maps the file has its tensors where vector units want them.
    text += b" " * (-(8 + len(text)) % 64)
    return len(text).to_bytes(8, "little") + text


def _pieces(planned: list[Planned], start: bytes, done: int, report: Callable[[int], object]) -> Iterator[Piece]:
    """Yield a file's bytes; `report` gets the tensors' bytes that have been taken, beginning with `done`."""
    yield start
    for one in planned:
        written = 0
        for piece in one.pieces():
            written += len(piece)
            yield piece
            report(done + written)
        assert written == one.size, (one.name, written, one.size)
        done += written
