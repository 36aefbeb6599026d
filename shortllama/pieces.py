"""Text files as documents in pieces, so that a file, or one document of it, may be larger than memory.

The joined pieces of a document are what `texts` calls that document: a text file is split at lines `<|endoftext|>` (a
file without one is a single document, kept to the last space), a JSONL file holds one document a line.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import IO, Any

from shortllama.errors import InputError

_SEPARATOR = re.compile(rb"<\|endoftext\|>[ \t]*\n?")
# Bytes of a line read at once: a longer one comes in several pieces.
PIECE_BYTES = 1 << 16


class Reading:
    """One pass over files, in order: iterates over their documents, each an iterator over pieces of its text.

    What is left of a document is skipped when the next is asked for, and blank documents are left out. `size` and
    `position` count bytes: of all files, and read so far. Raises InputError naming file and line or byte where
    something is not text.
    """

    def __init__(self, paths: Iterable[Path]) -> None:
        self._paths = tuple(paths)
        self.size = sum(path.stat().st_size for path in self._paths)
        self.position = 0

    def __iter__(self) -> Iterator[Iterator[str]]:
        self.position = 0
        for path in self._paths:
            yield from _filled(self._jsonl(path) if path.suffix == ".jsonl" else self._text(path))

    def _text(self, path: Path) -> Iterator[Iterator[str]]:
        """Documents between separators are stripped; a file without one is left as it is."""
        pieces, whole = self._pieces(path), not (_begins_blank(path) and _has_separator(path))
        for piece in pieces:
            if piece is not None:
                yield _document(chain((piece,), pieces), strip=not whole, only=whole)
            whole = False

    def _pieces(self, path: Path) -> Iterator[str | None]:
        """Yield the file's text in pieces, and None in place of each separator."""
        before = self.position
        decoder = codecs.getincrementaldecoder("utf-8")()
        with _opened(path) as file:
            for data, alone in _lines(file):
                self.position = before + file.tell()
                text = _decoded(decoder, data, path, file.tell(), final=False)
                yield None if alone and _SEPARATOR.fullmatch(data) else text
            _decoded(decoder, b"", path, file.tell(), final=True)

    def _jsonl(self, path: Path) -> Iterator[Iterator[str]]:
        before = self.position
        with _opened(path) as file:
            for number, line in enumerate(file, start=1):
                self.position = before + file.tell()
                if line.strip():
                    yield iter((document_of(line, f"{path}:{number}"),))


class Held:
    """Documents that are in memory already, to be used as a `Reading`."""

    def __init__(self, documents: Iterable[str]) -> None:
        self._documents = tuple(documents)
        self.size = sum(len(document.encode()) for document in self._documents)
        self.position = 0

    def __iter__(self) -> Iterator[Iterator[str]]:
        self.position = 0
        for document in self._documents:
            self.position += len(document.encode())
            yield iter((document,))


def sequences(path: Path) -> Iterator[tuple[int, ...]]:
    """Yield the token id sequences of a JSONL file, one list a line, exactly as given.

    Raises InputError with the line number for a line that is not a list of at least two token ids.
    """
    with _opened(path) as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield _sequence(_value(line, f"{path}:{number}"), f"{path}:{number}")


def _sequence(value: Any, where: str) -> tuple[int, ...]:
    good = isinstance(value, list) and all(type(token) is int and token >= 0 for token in value)
    if not good:
        raise InputError(f"{where}: saw {str(value)[:40]!r}; expected a list of token ids such as [1, 403]")
    if len(value) < 2:
        raise InputError(f"{where}: {len(value)} token ids; at least 2 are needed to predict one")
    return tuple(value)


def document_of(line: bytes, where: str) -> str:
    """Return the text of one line of JSONL: a string, or an object with "text". `where` names it in the error."""
    value = _value(line, where)
    document = value.get("text") if isinstance(value, dict) else value
    if not isinstance(document, str):
        seen = f"keys {', '.join(sorted(value)[:6])}" if isinstance(value, dict) else repr(value)[:40]
        raise InputError(f'{where}: saw {seen}; expected a string or an object with "text"')
    return document


def _value(line: bytes, where: str) -> Any:
    try:
        return json.loads(line)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        reason = error.msg if isinstance(error, json.JSONDecodeError) else "not UTF-8 text"
        raise InputError(f"{where}: not JSON ({reason}); expected one document a line") from None


def _opened(path: Path) -> IO[bytes]:
    try:
        return path.open("rb")
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error


def _decoded(decoder: codecs.IncrementalDecoder, data: bytes, path: Path, end: int, final: bool) -> str:
    """Decode the bytes that end at `end` in the file; a character cut in two waits for its rest in the decoder."""
    waiting = len(decoder.getstate()[0])
    try:
        return decoder.decode(data, final)
    except UnicodeDecodeError as error:
        at = end - len(data) - waiting + error.start
        raise InputError(f"{path}: not UTF-8 text (byte {at}); give a text or JSONL file") from None


def _lines(file: IO[bytes]) -> Iterator[tuple[bytes, bool]]:
    """Yield the lines, long ones in parts, and whether each is a whole line."""
    at_start = True
    while data := file.readline(PIECE_BYTES):
        ended = data.endswith(b"\n")
        yield data, at_start and (ended or len(data) < PIECE_BYTES)
        at_start = ended


def _begins_blank(path: Path) -> bool:
    with _opened(path) as file:
        return file.read(1).isspace()


def _has_separator(path: Path) -> bool:
    with _opened(path) as file:
        return any(alone and _SEPARATOR.fullmatch(data) for data, alone in _lines(file))


def _document(pieces: Iterator[str | None], strip: bool, only: bool) -> Iterator[str]:
    """Yield text up to a separator, without white space before it, and at the start where asked to `strip`.

    `only`: a document that is the whole file, no separator having come, keeps the end of the text as well.
    """
    waiting = ""  # white space that is the end of the document, unless more follows
    leading = strip
    for piece in pieces:
        if piece is None:
            return
        text = piece.lstrip() if leading else waiting + piece
        kept = text.rstrip()
        waiting = text[len(kept) :]
        if kept:
            leading = False
            yield kept
    if only and waiting:
        yield waiting


def _filled(documents: Iterable[Iterator[str]]) -> Iterator[Iterator[str]]:
    """Yield the documents that are not blank, and skip what the reader leaves of each."""
    for document in documents:
        blank: list[str] = []
        for piece in document:
            blank.append(piece)
            if piece.strip():
                yield chain(blank, document)
                break
        for _ in document:
            pass
