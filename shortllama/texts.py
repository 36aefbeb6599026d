"""Documents and token ids, from files or the hub: what calibration and evaluation read. No torch, no tokenizer.

SRC is a text file (documents separated by lines `<|endoftext|>`, else one document), a JSONL file (one document a
line: a string or an object with "text"), `ids:FILE.jsonl`, `hf:NAME[:CONFIG[:SPLIT]]` (see `hub`), or a short name
with an optional split (`wikitext2:test`) that is looked up in the data folder, and on the hub where that has none and
the name is one of `hub.DATA_SETS`. `self` is not a file and is answered by `calibration`.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import msgspec

from shortllama import hub, pieces
from shortllama.errors import InputError

IDS = "ids:"
HUB = hub.PREFIX
SUFFIXES = (".jsonl", ".txt", ".raw")
DATA_VARIABLE = "SHORTLLAMA_DATA"


class Documents(msgspec.Struct, frozen=True):
    """Texts in file order, none of them blank, with the name they are known by (never a path of this machine)."""

    name: str
    texts: tuple[str, ...]
    split: str | None = None


def read_documents(src: str, data_dir: Path | None = None, use: hub.Use = "calibration") -> Documents:
    """Return the documents that `src` names. `use` chooses the split of a data set on the hub where none is named.

    Raises InputError for what is missing, empty, or not text, UnsupportedError where the hub cannot be read.
    """
    asked = hub.parse(src, use) if on_hub(src, data_dir) else None
    if asked is not None:
        folder = None if src.startswith(HUB) else data_folder(data_dir)
        if folder is not None:
            asked = msgspec.structs.replace(asked, called=f"{asked.called}, which {folder} does not hold")
        name, texts = hub.read(asked)
        split = asked.split
    else:
        paths, name, split = locate(src, data_dir)
        texts = tuple("".join(document) for document in pieces.Reading(paths))
    if not texts:
        raise InputError(f"{src}: holds no text; give a file with some")
    return Documents(name, texts, split)


def on_hub(src: str, data_dir: Path | None = None, suffixes: tuple[str, ...] = SUFFIXES) -> bool:
    """Whether `src` is read from the hub: `hf:`, or a short name of a data set that the data folder does not hold."""
    if src.startswith(HUB):
        return True
    folder = data_folder(data_dir)
    name, _, split = src.partition(":")
    held = Path(src).is_file() or (folder is not None and bool(_in_folder(folder, name, split, suffixes)))
    return name in hub.DATA_SETS and not held


def data_folder(data_dir: Path | None) -> Path | None:
    """Return the folder that short names are looked up in: the one given, else $SHORTLLAMA_DATA, else None."""
    return data_dir or (Path(os.environ[DATA_VARIABLE]) if os.environ.get(DATA_VARIABLE) else None)


def locate(src: str, data_dir: Path | None, suffixes: tuple[str, ...] = SUFFIXES) -> tuple[list[Path], str, str | None]:
    """Return the files of `src`, its name and its split; in the data folder, files that end in one of `suffixes`."""
    path = Path(src)
    if path.is_file():
        return [path], path.name, None
    name, _, split = src.partition(":")
    folder = data_folder(data_dir)
    if path.exists() or "/" in src or path.suffix in suffixes:
        kind = "a folder" if path.is_dir() else "no such file"
        raise InputError(f"text source {src!r}: {kind}; give a text or JSONL file, ids:FILE.jsonl, or 'self'")
    if folder is None:
        raise InputError(
            f"text source {src!r}: no such file, and no data folder to look it up in; "
            f"give a file, 'self', or --data-dir (or ${DATA_VARIABLE})"
        )
    found = _in_folder(folder, name, split, suffixes)
    if not found:
        wanted = f"{name} with split {split!r}" if split else name
        raise InputError(f"text source {src!r}: {folder} holds no {wanted} ({', '.join(suffixes)}); give a file")
    return found, src, split or None


def _in_folder(folder: Path, name: str, split: str, suffixes: tuple[str, ...]) -> list[Path]:
    """Return `name`'s text files in the data folder: name.txt, or the files in name/ whose name has the split."""
    single = [folder / f"{name}{suffix}" for suffix in suffixes]
    inside = sorted((folder / name).iterdir()) if (folder / name).is_dir() else []
    found = [path for path in (*single, *inside) if path.is_file() and path.suffix in suffixes]
    return [path for path in found if not split or split in re.split(r"[._-]", path.name)]


def json_lines(text: str, path: Path) -> Iterator[tuple[int, Any]]:
    """Yield (line number from 1, decoded JSON) of each line that is not blank."""
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            yield number, json.loads(line)
        except json.JSONDecodeError as error:
            raise InputError(f"{path}:{number}: not JSON ({error.msg}); expected one document a line") from None


def read_ids(path: Path) -> tuple[tuple[int, ...], ...]:
    """Return the token id sequences of a JSONL file, one list a line, exactly as given.

    Raises InputError with the line number for a line that is not a list of at least two token ids.
    """
    sequences = tuple(pieces.sequences(path))
    if not sequences:
        raise InputError(f"{path}: holds no token ids; expected one list a line")
    return sequences


def check_vocabulary(sequences: Iterable[Iterable[int]], vocabulary: int, name: str) -> None:
    """Raise InputError naming the first sequence with a token id that a vocabulary of this size does not have."""
    for number, sequence in enumerate(sequences, start=1):
        highest = max(sequence)
        if highest >= vocabulary:
            raise InputError(
                f"{name}: sequence {number} holds token id {highest}, but this model's vocabulary has {vocabulary} "
                "entries; use ids made with this model's tokenizer"
            )
