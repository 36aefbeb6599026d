"""Token batches for criteria: drawn from text, read as ids, or sampled from the dense model itself, with a digest.

The published calibration is 10 windows of 128 tokens, each from another document, cut at a random place, and
therefore mostly without a BOS (Shortened LLaMA sec. 3.1, arXiv 2402.02834). Here a text with fewer documents than
samples gives several disjoint windows of one document, and a text that is too short is refused instead of repeated.
Knows no criterion; imports no torch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from shortllama import families, texts
from shortllama.errors import InputError

SELF = "self"
DEFAULT_SAMPLES = 10
DEFAULT_LENGTH = 128

# Logits of one batch in float32, at most: what bounds the memory of a pass over many samples or a large vocabulary.
LOGITS_BYTES = 256 * 2**20

Bos = Literal["document", "every"]
Tokenize = Callable[[str], Sequence[int]]


@dataclass(frozen=True)
class Calibration:
    """Token sequences, each (T,) int64, and their `description` as it goes into a scores file.

    All sequences are equally long unless they were given as ids. `description` holds source, digest (of the ids,
    so equal data has equal digests wherever it came from), samples, length (null if they differ), tokens, seed, bos.
    """

    sequences: tuple[np.ndarray, ...]
    description: dict[str, Any]

    @property
    def tokens(self) -> int:
        """All tokens, predicted or not."""
        return sum(map(len, self.sequences))

    def batches(self, rows: Callable[[int], int]) -> Iterator[np.ndarray]:
        """Yield (B, T) int64 arrays in order: runs of equally long sequences, at most `rows(T)` of them together."""
        start = 0
        while start < len(self.sequences):
            length = len(self.sequences[start])
            stop = start + 1
            limit = start + rows(length)
            while stop < min(limit, len(self.sequences)) and len(self.sequences[stop]) == length:
                stop += 1
            yield np.stack(self.sequences[start:stop])
            start = stop


def load(
    src: str = SELF,
    *,
    tokenizer: Any = None,
    model: Any = None,
    samples: int = DEFAULT_SAMPLES,
    length: int = DEFAULT_LENGTH,
    seed: int = 0,
    bos: Bos | None = None,
    data_dir: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Calibration:
    """Return the calibration that `src` names: `self`, `ids:FILE.jsonl`, or any text source of `texts`.

    `samples` sequences of `length` tokens; ids are used exactly as given instead. `bos`: "document" puts one in front
    of each document, so that a window has it only where it begins the document (the published way); "every" puts it
    at the start of every window, within the length; None is "every" for a `model` whose family needs one, else
    "document". Equal arguments give equal ids. Raises InputError for a source
    that is missing, empty, malformed (with the line) or too short, and for text without a tokenizer; UnsupportedError
    where the hub cannot be read.
    """
    if samples < 1 or length < 2:
        raise InputError(
            f"calibration of {samples} samples of {length} tokens; at least 1 sample of 2 tokens is needed"
        )
    if src.startswith(texts.IDS):
        path = Path(src.removeprefix(texts.IDS))
        return describe(texts.read_ids(path), f"{texts.IDS}{path.name}", seed=None, bos=None)
    if src == SELF:
        return _from_model(model, tokenizer, samples, length, seed, progress)
    documents = texts.read_documents(src, data_dir)
    tokenize = tokenize_with(tokenizer, documents.name)
    marker = bos_id(tokenizer)
    policy: Bos = bos or ("every" if needs_bos(model) else "document")
    if policy == "every" and marker is None:
        who = f"{model.config.model_type} models need" if bos is None else "every window is to have"
        raise InputError(
            f"{documents.name}: {who} a BOS token in front, and this tokenizer has none; set bos_token in the "
            "tokenizer's files, or use ids:FILE.jsonl that has it"
        )
    prefix = [] if marker is None else [marker]
    if policy == "document":
        windows = draw_windows(documents, lambda text: [*prefix, *tokenize(text)], samples, length, seed)
    else:
        bare = draw_windows(documents, tokenize, samples, length, seed)
        windows = [np.array([*prefix, *window[:-1]]) for window in bare]
    return describe(windows, documents.name, seed=seed, bos=policy)


def describe(
    sequences: Iterable[Sequence[int] | np.ndarray], source: str, *, seed: int | None, bos: str | None
) -> Calibration:
    """Return the Calibration of these sequences with its description filled in."""
    arrays = tuple(np.asarray(sequence, dtype=np.int64) for sequence in sequences)
    lengths = {len(array) for array in arrays}
    description = {
        "source": source,
        "digest": digest(arrays),
        "samples": len(arrays),
        "length": lengths.pop() if len(lengths) == 1 else None,
        "tokens": sum(map(len, arrays)),
        "seed": seed,
        "bos": bos,
    }
    return Calibration(arrays, description)


def digest(sequences: Iterable[np.ndarray]) -> str:
    """Return 16 hexadecimal digits over the lengths and ids of the sequences, in order."""
    whole = hashlib.sha256()
    for sequence in sequences:
        whole.update(len(sequence).to_bytes(8, "little"))
        whole.update(np.asarray(sequence, dtype="<i8").tobytes())
    return whole.hexdigest()[:16]


def rows_within(length: int, vocabulary: int) -> int:
    """Return how many sequences of `length` may run together so that their logits stay within `LOGITS_BYTES`."""
    return max(1, LOGITS_BYTES // (4 * length * vocabulary))


def tokenize_with(tokenizer: Any, name: str) -> Tokenize:
    """Return text -> ids without any special token. Raises InputError where there is no tokenizer."""
    if tokenizer is None:
        raise InputError(
            f"{name} is text, but this model comes without a tokenizer; use ids:FILE.jsonl or 'self', "
            "or put the tokenizer's files into the model's folder"
        )
    return lambda text: tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def bos_id(tokenizer: Any, model: Any = None) -> int | None:
    """Return the id that begins a text: the tokenizer's BOS, else the one in the model's config; None without one."""
    config = getattr(model, "config", None)
    for owner in (tokenizer, config):
        found = getattr(owner, "bos_token_id", None)
        if found is not None:
            return int(found)
    return None


def needs_bos(model: Any) -> bool:
    """Whether the family of a model needs a BOS in front of everything; False without a model."""
    family = families.FAMILIES.get(getattr(getattr(model, "config", None), "model_type", ""))
    return family is not None and family.needs_bos


def draw_windows(
    documents: texts.Documents, tokenize: Tokenize, samples: int, length: int, seed: int
) -> list[np.ndarray]:
    """Return `samples` disjoint windows of `length` ids: documents in random order, one window each, then more rounds.

    A window begins anywhere in its document with (nearly) equal chance. The first k windows do not depend on
    `samples`. Documents are tokenized only as they are needed. Raises InputError where there are not enough.
    """
    random = np.random.default_rng(seed)
    taken: list[np.ndarray] = []
    pools: list[list[np.ndarray]] = []
    for index in random.permutation(len(documents.texts)):
        windows = _cut(np.asarray(tokenize(documents.texts[index]), dtype=np.int64), length, random)
        if windows:
            taken.append(windows.pop())
            pools.append(windows)
        if len(taken) == samples:
            return taken
    while pools := [pool for pool in pools if pool]:
        for pool in pools:
            taken.append(pool.pop())
            if len(taken) == samples:
                return taken
    raise InputError(
        f"{documents.name}: holds {len(taken)} windows of {length} tokens, {samples} were asked for; "
        "give more text, fewer samples or a shorter length"
    )


def _cut(ids: np.ndarray, length: int, random: np.random.Generator) -> list[np.ndarray]:
    """Return the document's disjoint windows in random order, from a random offset."""
    count = len(ids) // length
    if count == 0:
        return []
    offset = int(random.integers(0, len(ids) - count * length + 1))
    starts = offset + length * random.permutation(count)
    return [ids[start : start + length] for start in starts]


def _from_model(
    model: Any, tokenizer: Any, samples: int, length: int, seed: int, progress: Callable[[int, int], None] | None
) -> Calibration:
    """Sample from the dense model at temperature 1, untruncated, each sequence beginning with a BOS."""
    if model is None:
        raise InputError("calibration 'self' samples from the model, but no model is loaded; give a text file instead")
    from shortllama import sampling

    marker = bos_id(tokenizer, model)
    if marker is None:
        raise InputError(
            "calibration 'self' needs a BOS token to begin with, and this model has none; give a text file"
        )
    prompt = np.full((samples, 1), marker, dtype=np.int64)
    ids = sampling.sample(model, prompt, length - 1, seed=seed, progress=progress)
    return describe(ids, SELF, seed=seed, bos="every")
