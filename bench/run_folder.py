"""A run's folder: measurements.jsonl, suite.toml as it was run, quality.json, subjects/. Refuses what is not ours."""

from __future__ import annotations

import json
from datetime import date
from pathlib import Path
from typing import Any

import msgspec

from bench import store
from bench.cells import BatchRange, Suite
from shortllama import files
from shortllama.errors import InputError

SUITE = "suite.toml"


def default(suite: str, device: str) -> Path:
    """Return runs/<suite>_<device>_<date>, where a sweep goes unless told otherwise."""
    return Path("runs") / f"{suite}_{device}_{date.today().isoformat()}"


def open_run(folder: Path, suite: Suite, text: bytes, *, resume: bool) -> bool:
    """Make `folder` a run of `suite`, whose document is `text`; return whether it is new.

    Raises InputError for a folder with other things in it, for an existing run unless `resume`, for a run of another
    suite, and where nothing can be written.
    """
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder}: is a file; give a folder that does not exist yet with --out")
    if folder.is_dir() and any(folder.iterdir()):
        _check_ours(folder, suite, resume)
        return False
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{folder}: cannot be written ({error.strerror}); give another --out") from error
    files.write_atomically(folder / SUITE, text)
    return True


def _check_ours(folder: Path, suite: Suite, resume: bool) -> None:
    if not (folder / SUITE).is_file():
        raise InputError(f"{folder}: exists and holds no {SUITE}, so it is not a run; give another --out")
    if not resume:
        raise InputError(f"{folder}: holds a run already; go on with it by --resume, or give another --out")
    before = files.decode_toml(files.read_bytes(folder / SUITE), Suite, str(folder / SUITE))
    for name in Suite.__struct_fields__:
        old, new = getattr(before, name), getattr(suite, name)
        if old != new:
            raise InputError(f"{folder}: was begun with {name} = {show(old)}, now {show(new)}; give another --out")


def discard(folder: Path) -> None:
    """Remove a new run in which nothing has been measured; one with rows stays."""
    if not store.file_of(folder).exists():
        files.remove_folder(folder)


def to_toml(suite: Suite) -> bytes:
    """Return the suite as a document that reads back as it is."""
    # A key that came later is left out where it is off: a revision before it, which `ab` may measure, knows no such.
    names = [name for name in Suite.__struct_fields__ if name != "telemetry" or suite.telemetry]
    lines = [f"{name} = {show(getattr(suite, name))}" for name in names]
    return ("# The suite as it was run, with the options of the command line.\n" + "\n".join(lines) + "\n").encode()


def show(value: Any) -> str:
    """Return a field of a suite as TOML. JSON's strings, numbers and lists of them are TOML's."""
    if isinstance(value, BatchRange):
        pairs = msgspec.to_builtins(value)
        return "{" + ", ".join(f"{name} = {show(one)}" for name, one in pairs.items()) + "}"
    return json.dumps(list(value) if isinstance(value, tuple) else value)
