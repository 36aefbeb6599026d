"""Results files: append-only JSONL, one row a line, on disk after every row. Only a sweep's parent process writes.

Reading is strict: a row that is cut off, edited or of another schema is named by its line. A file whose last line was
torn by a kill is repaired by the next `Writer` (`--resume`), never silently by a reader.
"""

from __future__ import annotations

import fcntl
import gc
import math
import os
from collections.abc import Generator, Iterable, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec

from bench.measurement import LARGEST_LINE_BYTES, SCHEMA, Environment, Frontier, Measurement, Row
from shortllama import files
from shortllama.errors import InputError

FILE_NAME = "measurements.jsonl"
STUDY = "study.jsonl"
_DECODER: msgspec.json.Decoder[Row] = msgspec.json.Decoder(Row)


class Results(msgspec.Struct, frozen=True):
    """The rows of one run, in file order; environments by id."""

    path: Path
    environments: dict[str, Environment]
    measurements: tuple[Measurement, ...]
    frontiers: tuple[Frontier, ...]


def file_of(path: Path) -> Path:
    """Return the results file of a run: the file itself, or the one in a run's folder."""
    return path / FILE_NAME if path.is_dir() else path


def measured(paths: Sequence[Path]) -> list[Path]:
    """Return the paths but studies (`shortllama study`): these hold what models are worth, and no measurements.

    Raises InputError where only studies are given.
    """
    found = [path for path in paths if file_of(path).exists() or not (path / STUDY).exists()]
    if paths and not found:
        raise InputError(f"{paths[0]}: a study without measurements; give a run beside it (see shortllama sweep --out)")
    return found


# -- reading -----------------------------------------------------------------------------------------------------------


def read(path: Path) -> Results:
    """Return the run in a folder or file.

    Raises InputError for an unreadable file, a line that is no row (by number), a row of an unknown environment or
    with another cell's id, and for a run without rows.
    """
    file = file_of(path)
    if path.is_dir() and not file.exists():
        raise InputError(f"{path}: holds no {FILE_NAME}; give the folder of a run (see shortllama sweep --out)")
    data = files.read_bytes(file)
    rows = _decode(data, file)
    environments = {row.id: row for row in rows if isinstance(row, Environment)}
    measurements = tuple(row for row in rows if isinstance(row, Measurement))
    frontiers = tuple(row for row in rows if isinstance(row, Frontier))
    if not measurements and not frontiers:
        raise InputError(f"{file}: a run without rows; nothing was measured (sweep again, or with --resume)")
    _check(rows, environments, data, file)
    return Results(file, environments, measurements, frontiers)


def _decode(data: bytes, file: Path) -> list[Row]:
    # Collecting garbage during the decode of many live objects takes twice as long as the decode itself.
    with _collection_off():
        try:
            return _DECODER.decode_lines(data)
        except (msgspec.DecodeError, UnicodeDecodeError):
            raise _explain(data, file) from None


@contextmanager
def _collection_off() -> Generator[None]:
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _explain(data: bytes, file: Path) -> InputError:
    """Return the error of the first line that does not decode."""
    lines = data.split(b"\n")
    for number, line in enumerate(lines, 1):
        try:
            _DECODER.decode(line)
        except (msgspec.DecodeError, UnicodeDecodeError):
            last = number == len(lines)
            if last and not line:
                break
            if last:
                return InputError(f"{file}: line {number} is cut off; repair the run with shortllama sweep --resume")
            schema = _fields(line).get("schema", SCHEMA)
            if schema != SCHEMA:
                return InputError(
                    f"{file}: line {number}: $.schema is {schema!r}, and this version reads {SCHEMA}; read it with the "
                    "version of shortllama that wrote it, or upgrade"
                )
            try:
                files.decode_json(line, _kind(line), f"{file}: line {number}")
            except InputError as error:
                return error
    raise AssertionError("a file that does not decode has a line that does not decode")


def _kind(line: bytes) -> Any:
    """Return the type that a bad line claims to be, for the best message; any row where it does not say."""
    kinds = {"environment": Environment, "measurement": Measurement, "frontier": Frontier}
    return kinds.get(str(_fields(line).get("kind")), Row)


def _fields(line: bytes) -> dict[str, Any]:
    """The fields of a bad line, none where it is no JSON object."""
    try:
        return msgspec.json.decode(line, type=dict[str, Any])
    except (msgspec.DecodeError, UnicodeDecodeError):
        return {}


def _check(rows: Iterable[Row], environments: dict[str, Environment], data: bytes, file: Path) -> None:
    for index, row in enumerate(rows):
        if isinstance(row, Environment):
            continue
        wrong = None
        if row.environment not in environments:
            wrong = f"environment {row.environment!r} is not defined in this file"
        elif isinstance(row, Measurement) and row.cell_id != row.cell.id:
            wrong = f"cell_id {row.cell_id!r} is not its cell's, {row.cell.id!r}"
        if wrong:
            written = [number for number, line in enumerate(data.split(b"\n"), 1) if line.strip()]
            raise InputError(f"{file}: line {written[index]}: {wrong}; was the file edited or put together by hand?")


# -- writing -----------------------------------------------------------------------------------------------------------


class Writer:
    """Appends rows to a results file; a context manager.

    Opening repairs a torn last line (cuts it, or ends it where it is a whole row) and locks the file against a second
    writer. Every `write` is flushed to disk; one that fails leaves the file as it was. Environments are written once.
    """

    def __init__(self, path: Path) -> None:
        self.path = file_of(path)
        try:
            self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        except OSError as error:
            raise InputError(f"{self.path}: cannot be written ({error.strerror})") from error
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._environments = self._repair()
        except BlockingIOError:
            os.close(self._file)
            raise InputError(f"{self.path}: another sweep is writing here; wait for it or give another --out") from None
        except BaseException:
            os.close(self._file)
            raise

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file and give up its lock; closing twice is fine."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def _repair(self) -> set[str]:
        """Mend the end of the file; return the ids of the environments in it."""
        data = self.path.read_bytes()
        whole = data.rfind(b"\n") + 1
        if whole < len(data):
            try:
                _DECODER.decode(data[whole:])
            except (msgspec.DecodeError, UnicodeDecodeError):
                os.ftruncate(self._file, whole)
                os.fsync(self._file)
            else:
                self._append(b"\n")
        marked = (line for line in data[:whole].splitlines() if b'"kind":"environment"' in line)
        return {row.id for row in _decode(b"\n".join(marked), self.path) if isinstance(row, Environment)}

    def write(self, row: Row) -> None:
        """Append one row. Raises InputError where the disk refuses it (full, quota), the file being left as it was."""
        if isinstance(row, Environment):
            if row.id not in self._environments:
                self._append(encode(row))
                self._environments.add(row.id)
            return
        assert row.environment in self._environments, f"environment {row.environment} was not written before its row"
        self._append(encode(row))

    def _append(self, line: bytes) -> None:
        size = os.fstat(self._file).st_size
        try:
            while line:  # a full disk takes what fits, and fails at the next byte
                line = line[os.write(self._file, line) :]
            os.fsync(self._file)
        except OSError as error:
            os.ftruncate(self._file, size)
            raise InputError(
                f"{self.path}: cannot be written ({error.strerror}); free some space and go on with --resume"
            ) from error


def encode(row: Row) -> bytes:
    """Return the row as one line. Refuses (assertion) a number that is not finite and a line over 8 KiB."""
    # msgspec would write NaN as null, and a failed statistic would become a missing one.
    assert _is_finite(msgspec.to_builtins(row)), f"a row holds a number that is not finite: {row}"
    line = msgspec.json.encode(row) + b"\n"
    assert len(line) <= LARGEST_LINE_BYTES, f"a row of {len(line)} bytes is over {LARGEST_LINE_BYTES}"
    return line


def _is_finite(value: Any) -> bool:
    if isinstance(value, float):
        return math.isfinite(value)
    if isinstance(value, dict):
        return all(map(_is_finite, value.values()))
    if isinstance(value, list | tuple):
        return all(map(_is_finite, value))
    return True
