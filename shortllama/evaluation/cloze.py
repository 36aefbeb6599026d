"""Two tasks made of text that the dense model wrote: no data, and no model for whose text they are too hard.

`self-ending` shows the first half of a text and asks which of four endings goes on: choosing. `self-word` asks for the
word that comes next, which has to be the model's likeliest: generating. Both are of the same texts, so that what a
pruned model loses of the one and of the other can be compared (ShortGPT, arXiv 2403.03853, sees generating fall first).
A small model guesses at the published sets, where pruning has nothing to take away.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from shortllama import calibration
from shortllama.errors import InputError
from shortllama.evaluation.tasks import ENDING, WORD, Item, Items

TEXTS = 500
TOKENS = 128
ENDING_WORDS = 12
CHOICES = 4


def make(
    names: Sequence[str],
    dense: Any,
    tokenizer: Any,
    *,
    by: str,
    limit: int | None = None,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Items]:
    """Return the items of those of `names` that are made of text, from one sample of the model `dense`, called `by`.

    `limit` texts, by default 500, of 128 tokens at temperature 1. Raises InputError where it writes no words.
    """
    wanted = [name for name in names if name in MAKERS]
    if not wanted:
        return {}
    if tokenizer is None:
        raise InputError(f"task {wanted[0]!r} is made of text, but this model comes without a tokenizer")
    samples = max(limit or TEXTS, CHOICES)
    drawn = calibration.load(
        calibration.SELF,
        tokenizer=tokenizer,
        model=dense,
        samples=samples,
        length=TOKENS,
        seed=seed,
        progress=progress,
    )
    eos = tokenizer.eos_token_id
    texts = [tokenizer.decode(_until(ids.tolist(), eos), skip_special_tokens=True) for ids in drawn.sequences]
    return {name: items(name, texts, f"text of {by}, seed {seed}") for name in wanted}


def _until(ids: list[int], end: int | None) -> list[int]:
    return ids[: ids.index(end)] if end in ids else ids


def items(name: str, texts: Sequence[str], origin: str) -> Items:
    """Return the items of one task from texts, each of which gives one where it is long enough. Pure.

    Raises InputError where fewer than four are.
    """
    halves = [half for text in texts if (half := _halves(text)) is not None]
    if len(halves) < CHOICES:
        raise InputError(
            f"task {name!r}: only {len(halves)} of {len(texts)} texts that the model wrote have "
            f"{2 * ENDING_WORDS + 1} words; leave it out of --tasks, or give a higher --limit"
        )
    found = MAKERS[name](halves)
    return Items(found, origin, hashlib.sha256(msgspec.json.encode(found)).hexdigest()[:16])


def _halves(text: str) -> tuple[str, tuple[str, ...]] | None:
    """Return the first half of a text, and the words that follow it; None where too few do.

    The last word is left out: the text may have been cut within it.
    """
    words = text.split()[:-1]
    middle = len(words) // 2
    if middle < ENDING_WORDS:
        return None
    return " ".join(words[:middle]), tuple(words[middle : middle + ENDING_WORDS])


def _endings(halves: Sequence[tuple[str, tuple[str, ...]]]) -> tuple[Item, ...]:
    """The true ending among those of the next three texts; its place goes round."""
    endings = [" ".join(words) for _, words in halves]
    found: list[Item] = []
    for place, (context, _) in enumerate(halves):
        gold = place % CHOICES
        others = [endings[(place + step) % len(endings)] for step in range(1, CHOICES)]
        found.append(Item((context,), (*others[:gold], endings[place], *others[gold:]), gold))
    return tuple(found)


def _words(halves: Sequence[tuple[str, tuple[str, ...]]]) -> tuple[Item, ...]:
    return tuple(Item((context,), (words[0],), 0) for context, words in halves)


MAKERS: dict[str, Callable[[Sequence[tuple[str, tuple[str, ...]]]], tuple[Item, ...]]] = {
    ENDING: _endings,
    WORD: _words,
}
