"""Reading and writing small documents: strict, atomic, with errors a user can act on.

Every JSON or TOML file of the project passes through here, so that "nothing half-written" and "the path of the
offending key" hold everywhere. Knows no document type.
"""

from __future__ import annotations

import difflib
import os
import re
import secrets
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from shortllama.errors import InputError

T = TypeVar("T")


def read_bytes(path: Path) -> bytes:
    """Return the file's bytes. Raises InputError where it is missing, a folder, or not readable."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error


def decode_json(data: bytes, kind: type[T], where: str) -> T:
    """Decode strict JSON into the Struct `kind`; `where` names the document in the error."""
    return _decode(data, kind, where, msgspec.json.decode)


def decode_toml(data: bytes, kind: type[T], where: str) -> T:
    """Decode strict TOML into the Struct `kind`; `where` names the document in the error."""
    return _decode(data, kind, where, msgspec.toml.decode)


def _decode(data: bytes, kind: type[T], where: str, decode: Callable[..., Any]) -> T:
    try:
        raw = decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{where}: not readable: {error}; was it cut off or edited by hand?") from error
    try:
        return msgspec.convert(raw, kind)
    except msgspec.ValidationError as error:
        raise InputError(f"{where}: {explain(error, raw, kind)}") from error


def explain(error: msgspec.ValidationError, raw: object, kind: Any) -> str:
    """Return msgspec's message with what it leaves out: the path at top level, the value seen, the nearest name."""
    message = str(error)
    match = re.search(r" - at `(\$.*)`$", message)
    path = match.group(1) if match else "$"
    text = message[: match.start()] if match else message
    unknown = re.search(r"unknown field `(.+?)`", text)
    if unknown:
        name = unknown.group(1)
        near = difflib.get_close_matches(name, _field_names(kind), n=1)
        return f"unknown key {path}.{name}" + (f"; did you mean {near[0]!r}?" if near else "")
    seen = _look_up(raw, path)
    return f"{path}: {text}" + ("" if seen is None else f", saw {str(seen)[:60]!r}")


def _field_names(kind: Any) -> list[str]:
    """Every field name of a Struct and the Structs inside it."""
    names: list[str] = []
    pending: list[Any] = [kind]
    met: set[Any] = set()
    while pending:
        current = pending.pop()
        pending.extend(getattr(current, "__args__", ()))
        if isinstance(current, type) and issubclass(current, msgspec.Struct) and current not in met:
            met.add(current)
            for field in msgspec.structs.fields(current):
                names.append(field.encode_name)
                pending.append(field.type)
    return names


def _look_up(raw: object, path: str) -> object:
    value: Any = raw
    for name, index in re.findall(r"\.([^.\[]+)|\[(\d+)\]", path):
        try:
            value = value[name] if name else value[int(index)]
        except (KeyError, IndexError, TypeError):
            return None
    return value if not isinstance(value, dict | list) else None


def encode_json(value: Any, *, indent: int = 2) -> bytes:
    """Return deterministic, indented JSON with a final newline."""
    return msgspec.json.format(msgspec.json.encode(value, order="deterministic"), indent=indent) + b"\n"


def write_atomically(path: Path, data: bytes) -> None:
    """Write `data` to `path` through a temporary name in the same folder: the old file or the new one, never a part.

    Raises InputError where the folder is missing, not writable, or full.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise InputError(f"{path}: cannot be written ({error.strerror})") from error


@contextmanager
def new_folder(path: Path, mark: str) -> Generator[Path]:
    """Yield a temporary folder that becomes `path` when the block ends well, and vanishes when it does not.

    An existing `path` is replaced only if it is empty or holds the file named `mark`, which says that it is ours;
    anything else raises InputError before any work is done.
    """
    check_folder(path, mark)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        temporary.parent.mkdir(parents=True, exist_ok=True)
        temporary.mkdir()
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror})") from error
    old = path.with_name(f".{path.name}.{secrets.token_hex(4)}.old")
    try:
        yield temporary
        if path.exists():
            os.replace(path, old)
        os.replace(temporary, path)
    except BaseException:
        if old.exists() and not path.exists():
            os.replace(old, path)
        remove_folder(temporary)
        raise
    remove_folder(old)


def check_folder(path: Path, mark: str) -> None:
    """Raise InputError unless `path` can become an output folder of ours: absent, empty, or holding `mark`."""
    if path.exists() and not path.is_dir():
        raise InputError(f"{path}: is a file; give a folder that does not exist yet")
    if path.is_dir() and any(path.iterdir()) and not (path / mark).exists():
        raise InputError(f"{path}: exists and holds no {mark}, so it is not ours to replace; give another --out")


def remove_folder(path: Path) -> None:
    """Remove a folder of ours with everything in it; an absent one is fine."""
    import shutil

    shutil.rmtree(path, ignore_errors=True)
