"""A source of text as windows of token ids under a protocol, made as they are needed.

Nothing holds a whole text: files are read in pieces, tokenized in blocks and cut into windows while a model runs on
them. A second pass makes the same windows again, so that several subjects meet exactly the same tokens.

Legend: N tokens, T tokens of a window. Rows are those of `tokens`: id, bytes, words.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any, Literal

import numpy as np

from shortllama import calibration, hub, pieces, texts
from shortllama.errors import InputError
from shortllama.evaluation import tokens
from shortllama.evaluation.protocol import Protocol, check, parse

SELF_SAMPLES = 64
# Characters tokenized together for each token of a document's first window: more than a token ever takes on average.
CHARACTERS_A_TOKEN = 8
BLANK_LINE = "\n\n"
# What files call a split.
SPLIT_NAMES = {"validation": ("validation", "valid", "val", "dev")}

Reading = pieces.Reading | pieces.Held


@dataclass(frozen=True)
class Window:
    """Tokens run in one piece, as rows (T, 3); the last `fresh` of them count as predicted, except one at the start."""

    rows_T3: np.ndarray
    fresh: int

    @property
    def ids(self) -> np.ndarray:
        """Token ids (T,)."""
        return self.rows_T3[:, 0]

    @property
    def first(self) -> int:
        """Index of the first predicted token."""
        return max(1, len(self.rows_T3) - self.fresh)

    @property
    def predicted(self) -> np.ndarray:
        """How many tokens, bytes and words are predicted, (3,)."""
        return np.array([len(self.rows_T3) - self.first, *self.rows_T3[self.first :, 1:].sum(axis=0)])


@dataclass
class Seen:
    """How far a pass is: the reading, the tokens that were cut into windows and the bytes that they cover."""

    reading: Reading
    tokens: int = 0
    covered: int = 0

    def count(self, blocks: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        """Yield the blocks of rows of a new pass, counting."""
        self.tokens = self.covered = 0
        for block_N3 in blocks:
            self.tokens += len(block_N3)
            self.covered += int(block_N3[:, 1].sum())
            yield block_N3


@dataclass(frozen=True)
class Text:
    """A source under its protocol, ready to run (see `Perplexity` for the fields); `windows` gives a new pass.

    `counted`: what tokens cover is known. `seen` says how far the newest pass is.
    """

    name: str
    make: Callable[[], Iterator[Window]]
    window: int | None
    stride: int | None
    bos: Literal["stream", "window", "none", "given"]
    layout: Literal["stream", "documents"]
    split: str | None = None
    counted: bool = False
    limit: int | None = None
    seen: Seen | None = None

    def windows(self) -> Iterator[Window]:
        """Return the windows, from the first."""
        return islice(self.make(), self.limit)

    def expected(self, done: int) -> int:
        """Return about how many windows there are, given that `done` have been taken: from the share of text seen."""
        total, seen = done, self.seen
        if seen is not None and self.layout == "documents":
            total = round(done * seen.reading.size / max(1, seen.reading.position))
        elif seen is not None and self.window is not None and self.stride is not None:
            scale = seen.reading.size / seen.covered if seen.covered else 1
            total = (round(seen.tokens * scale) - self.window) // self.stride + 1
        return max(done, total if self.limit is None else min(total, self.limit))


def prepare(
    src: str,
    *,
    tokenizer: Any = None,
    dense: Any = None,
    protocol: Protocol | None = None,
    limit: int | None = None,
    seed: int = 0,
    data_dir: Path | None = None,
) -> Text:
    """Return `src` (a text or JSONL file, short name, `ids:FILE.jsonl` or `self`) as windows.

    `src` may end in a protocol (`wikitext2@2048`, see `protocol`); `protocol` is the one to use where it does not.
    `limit` is the most windows taken. `ids:` lines are taken whole as given; `self` is `limit` (default 64) sequences
    of `window` tokens sampled from `dense`. Raises InputError for a bad source or protocol, and for text that gives no
    window.
    """
    bare, named = parse(src)
    used = protocol if protocol is not None and bare == src else named
    check(used, src)
    if limit is not None and limit < 1:
        raise InputError(f"limit of {limit} windows; give at least 1")
    if bare == calibration.SELF:
        drawn = calibration.load(
            bare, tokenizer=tokenizer, model=dense, samples=limit or SELF_SAMPLES, length=used.window, seed=seed
        )
        return _given(bare, lambda: drawn.sequences, len(drawn.sequences))
    if bare.startswith(texts.IDS):
        path = Path(bare.removeprefix(texts.IDS))
        text = _given(f"{texts.IDS}{path.name}", lambda: pieces.sequences(path), limit)
        if next(text.windows(), None) is None:
            raise InputError(f"{path}: holds no token ids; expected one list a line")
        return text
    return _from_documents(bare, used, tokenizer, limit, data_dir)


def cut(blocks: Iterable[np.ndarray], window: int, stride: int) -> Iterator[Window]:
    """Yield the full windows of a stream of rows (N, 3) from its start; the tail that fills none is dropped."""
    held_N3, fresh = np.empty((0, 3), dtype=np.int64), window
    for block_N3 in blocks:
        held_N3 = np.concatenate([held_N3, block_N3])
        start = 0
        while len(held_N3) - start >= window:
            yield Window(held_N3[start : start + window], fresh)
            start, fresh = start + stride, stride
        held_N3 = held_N3[start:]


class Digest:
    """What `calibration.digest` says of a series of sequences, fed with one at a time."""

    def __init__(self) -> None:
        self._whole = hashlib.sha256()

    def add(self, ids_T: np.ndarray) -> None:
        """Take the next sequence of token ids."""
        self._whole.update(len(ids_T).to_bytes(8, "little"))
        self._whole.update(np.ascontiguousarray(ids_T, dtype="<i8").tobytes())

    def __str__(self) -> str:
        return self._whole.hexdigest()[:16]


# -- making the windows -----------------------------------------------------------------------------------------------


def _given(name: str, sequences: Callable[[], Iterable[Any]], limit: int | None) -> Text:
    def make() -> Iterator[Window]:
        for sequence in sequences():
            rows_T3 = _bare(np.asarray(sequence, dtype=np.int64))
            yield Window(rows_T3, len(rows_T3))

    return Text(name, make, window=None, stride=None, bos="given", layout="documents", limit=limit)


def _from_documents(src: str, used: Protocol, tokenizer: Any, limit: int | None, data_dir: Path | None) -> Text:
    reading, name, split = _open(src, data_dir)
    calibration.tokenize_with(tokenizer, name)  # refuses a missing tokenizer
    marker = calibration.bos_id(tokenizer)
    policy = used.bos or ("none" if marker is None else "stream")
    if policy != "none" and marker is None:
        raise InputError(f"{name}: BOS policy {policy!r}, but this tokenizer has no BOS token; use {src}@bos=none")
    prefix_N3 = _bare(np.array([] if marker is None else [marker], dtype=np.int64))
    start_N3 = prefix_N3[: 1 if policy == "stream" else 0]
    seen = Seen(reading)

    def make() -> Iterator[Window]:
        if used.layout == "stream":
            blocks = chain([start_N3], tokens.tokenize(_joined(reading), tokenizer, name))
            found = cut(seen.count(blocks), used.window, used.step)
        else:
            found = (_head(chain([start_N3], _tokens_of(document)), used.window) for document in reading)
        for one in found:
            whole = Window(np.concatenate([prefix_N3, one.rows_T3]), one.fresh) if policy == "window" else one
            if whole.first < len(whole.rows_T3):
                yield whole

    def _tokens_of(document: Iterator[str]) -> Iterator[np.ndarray]:
        return tokens.tokenize(document, tokenizer, name, chunk=CHARACTERS_A_TOKEN * used.window)

    counted = tokens.counts_text(tokenizer)
    text = Text(name, make, used.window, used.step, policy, used.layout, split, counted, limit, seen)
    if next(text.windows(), None) is None:
        held = sum(map(len, tokens.tokenize(_joined(reading), tokenizer, name))) + len(start_N3)
        raise InputError(
            f"{name}: {held} tokens give no window of {used.window}; give more text or a shorter window, "
            f"such as {src}@window={max(2, held // 2)}"
        )
    return text


def _open(src: str, data_dir: Path | None) -> tuple[Reading, str, str | None]:
    """Return the text that `src` names, its name and its split; files are streamed, the hub's text is held."""
    asked = hub.parse(src, "evaluation")
    if texts.on_hub(src, data_dir):
        found = texts.read_documents(src, data_dir, "evaluation")
        return pieces.Held(found.texts), found.name, found.split
    paths, name, split = texts.locate(_held_out(src, asked, data_dir), data_dir)
    return pieces.Reading(paths), name, split


def _held_out(src: str, asked: hub.Asked | None, data_dir: Path | None) -> str:
    """Return a short name with the split that is evaluated, where the data folder tells splits apart."""
    if asked is None or ":" in src or Path(src).is_file():
        return src
    names = (f"{src}:{split}" for split in SPLIT_NAMES.get(asked.split, (asked.split,)))
    return next((name for name in names if not texts.on_hub(name, data_dir)), src)


def _joined(reading: Reading) -> Iterator[str]:
    """Yield the pieces of all documents, with a blank line between two."""
    for number, document in enumerate(reading):
        if number:
            yield BLANK_LINE
        yield from document


def _head(blocks: Iterator[np.ndarray], window: int) -> Window:
    """Return the first `window` rows of a document, or all of a shorter one, as one window."""
    parts, missing = [], window
    for block_N3 in blocks:
        parts.append(block_N3[:missing])
        missing -= len(parts[-1])
        if missing == 0:
            break
    return Window(np.concatenate(parts), window)


def _bare(ids_N: np.ndarray) -> np.ndarray:
    """Return ids (N,) as rows that cover no text."""
    return np.stack([ids_N, np.zeros_like(ids_N), np.zeros_like(ids_N)], axis=1)
