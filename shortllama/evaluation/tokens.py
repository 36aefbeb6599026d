"""Text of any length as tokens with the bytes and words that each covers, a block at a time.

A long text is tokenized in overlapping chunks that are joined where both chunks hold the same run of tokens at the same
places. A boundary on which merges from either side agree is a boundary of the whole text's tokens, so the result is
that of tokenizing all of it at once, in memory that does not grow with the text. A tokenizer that tells no offsets
(Python ones) gets the whole text at once, and its tokens cover nothing that can be counted.

Legend: N tokens. Rows are (N, 3) int64: token id, bytes covered (UTF-8), words that begin in it (split at white space).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from shortllama import calibration

CHUNK = 1 << 16
OVERLAP = 1 << 10
# Equal tokens on both sides of a joint.
AGREEING = 4
_WHITE_SPACE = np.array([code for code in range(0x3001) if chr(code).isspace()], dtype=np.uint32)


@dataclass(frozen=True)
class _Encoded:
    """The tokens of a text, with where each starts and ends in it, in characters."""

    rows_N3: np.ndarray
    starts_N: np.ndarray
    ends_N: np.ndarray


def counts_text(tokenizer: Any) -> bool:
    """Whether this tokenizer tells which text a token covers."""
    return bool(getattr(tokenizer, "is_fast", False))


def tokenize(pieces: Iterable[str], tokenizer: Any, name: str, chunk: int | None = None) -> Iterator[np.ndarray]:
    """Yield the rows (N, 3) of the text that `pieces` make up, without any special token added, block after block.

    `chunk` (default: CHUNK) characters are tokenized together. Raises InputError, with `name`, without a tokenizer.
    """
    plain = calibration.tokenize_with(tokenizer, name)
    if not counts_text(tokenizer):
        ids_N = np.asarray(plain("".join(pieces)), dtype=np.int64)
        yield np.stack([ids_N, np.zeros_like(ids_N), np.zeros_like(ids_N)], axis=1)
        return
    feed, size = iter(pieces), max(chunk or CHUNK, 2 * OVERLAP)
    text, ended = _filled("", feed, size)
    now, begin = _encode(text, tokenizer), 0
    while not ended:
        shift = len(text) - OVERLAP
        following, ended = _filled(text[shift:], feed, size)
        then = _encode(following, tokenizer)
        joint = _joint(now, then, shift)
        if joint is None:  # no agreement anywhere: the two chunks become one
            text += following[OVERLAP:]
            now = _encode(text, tokenizer)
            continue
        yield now.rows_N3[begin : joint[0]]
        text, now, begin = following, then, joint[1]
    yield now.rows_N3[begin:]


def _filled(text: str, feed: Iterator[str], size: int) -> tuple[str, bool]:
    """Return `text` with pieces added until it has `size` characters more, and whether there are no more pieces."""
    parts, missing = [text], size
    for piece in feed:
        parts.append(piece)
        missing -= len(piece)
        if missing <= 0:
            return "".join(parts), False
    return "".join(parts), True


def _encode(text: str, tokenizer: Any) -> _Encoded:
    found = tokenizer(text, add_special_tokens=False, verbose=False, return_offsets_mapping=True)
    ids_N = np.asarray(found["input_ids"], dtype=np.int64)
    spans_N2 = np.asarray(found["offset_mapping"], dtype=np.int64).reshape(len(ids_N), 2)
    codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
    sizes = 1 + (codes >= 0x80) + (codes >= 0x800) + (codes >= 0x10000)
    inside = ~np.isin(codes, _WHITE_SPACE)
    begins = inside & ~np.concatenate([[False], inside[:-1]]) if len(codes) else inside
    # A token covers what lies between the ends of the token before and its own; several may share one character.
    ends_N = np.maximum.accumulate(spans_N2[:, 1]) if len(ids_N) else spans_N2[:, 1]
    covered = (
        np.diff(np.concatenate([[0], np.cumsum(each)])[np.concatenate([[0], ends_N])]) for each in (sizes, begins)
    )
    return _Encoded(np.stack([ids_N, *covered], axis=1), spans_N2[:, 0], spans_N2[:, 1])


def _joint(now: _Encoded, then: _Encoded, shift: int) -> tuple[int, int] | None:
    """Return the token with which `then`, a text that starts `shift` characters later, takes over, in both countings.

    Of the places where AGREEING tokens on either side are the same, the one nearest to the middle of the overlap.
    """
    places, heres, theres = np.intersect1d(now.starts_N - shift, then.starts_N, return_indices=True)
    for which in np.argsort(np.abs(places - OVERLAP // 2), kind="stable"):
        here, there = int(heres[which]), int(theres[which])
        left, right = slice(here - AGREEING, here + AGREEING), slice(there - AGREEING, there + AGREEING)
        if min(left.start, right.start) < 0 or left.stop > len(now.starts_N) or right.stop > len(then.starts_N):
            continue
        same = (
            (now.rows_N3[left, 0] == then.rows_N3[right, 0])
            & (now.starts_N[left] - shift == then.starts_N[right])
            & (now.ends_N[left] - shift == then.ends_N[right])
        )
        if same.all() and now.ends_N[here - 1] <= now.starts_N[here]:
            return here, there
    return None
