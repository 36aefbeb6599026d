"""Text for training the reference model: any folder of .txt, .raw and .jsonl files becomes weighted token streams.

Each entry of the folder (a file or a sub-folder) is one source. Knows files and tokenizers, not models.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from shortllama.errors import InputError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

SUFFIXES = (".txt", ".raw", ".jsonl")
END_OF_TEXT = "<|endoftext|>"


def documents(path: Path) -> Iterator[str]:
    """Yield the documents of one file: the `text` of each JSON line, or parts between end-of-text marks."""
    if path.suffix == ".jsonl":
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                try:
                    text = json.loads(line)["text"]
                except (ValueError, KeyError, TypeError) as error:
                    raise InputError(f"{path}:{number}: expected a JSON object with a `text` field") from error
                yield text.strip()
        return
    for part in path.read_text(encoding="utf-8", errors="replace").split(END_OF_TEXT):
        if part.strip():
            yield part.strip()


def sources(folder: Path) -> dict[str, list[str]]:
    """Return {source name: documents} for each entry of `folder` that holds text, in name order."""
    found: dict[str, list[str]] = {}
    for entry in sorted(folder.iterdir()):
        files = [entry] if entry.is_file() else sorted(p for p in entry.rglob("*") if p.is_file())
        texts = [text for file in files if file.suffix in SUFFIXES for text in documents(file)]
        if texts:
            found[entry.stem if entry.is_file() else entry.name] = texts
    if not found:
        raise InputError(f"{folder}: no {', '.join(SUFFIXES)} file found; give a folder of text")
    return found


def stream(texts: list[str], tokenizer: Tokenizer) -> np.ndarray:
    """Return one uint16 stream: BOS, document, BOS, document, ... (`tokenizer` adds the BOS)."""
    # A book as one string is slow to merge, so lines are encoded apart: "\n" + line gives the word mark, the newline
    # byte and the line's own tokens, exactly as inside the whole text once that first mark is cut off.
    bos: int = tokenizer.encode("").ids[0]
    ids: list[int] = []
    for text in texts:
        first, *rest = text.split("\n")
        ids.append(bos)
        ids += tokenizer.encode(first, add_special_tokens=False).ids
        for encoded in tokenizer.encode_batch(["\n" + line for line in rest], add_special_tokens=False):
            ids += encoded.ids[1:]
    return np.asarray(ids, dtype=np.uint16)
