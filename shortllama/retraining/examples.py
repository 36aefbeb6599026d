"""What retraining learns from: sequences of token ids with the part of each that is to be predicted, in a fixed order.

Text is packed: documents in random order, one separator between two of them (the BOS, or the EOS of a tokenizer without
one), cut into full windows; a window may hold the end of one document and the start of another. Instructions are one
example each, their prompt masked; one whose prompt fills the cut-off has nothing to learn from and is skipped. Ids are
used as given. Which examples a step takes depends on the seed and the step alone, never on processes or on resuming.

Knows no model but the one it may sample from, and imports no torch. Legend: B sequences, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from shortllama import calibration, hub, texts
from shortllama.errors import InputError
from shortllama.retraining import instructions
from shortllama.retraining.instructions import Instruction
from shortllama.retraining.recipes import Stage
from shortllama.retraining.record import Data

Progress = Callable[[int, int], None]

# Padded lengths are multiples of this: matrix units work on such pieces, and shapes repeat.
_MULTIPLE = 8

# At most one example in so many is held out, so that evaluating them stays cheap beside a short run.
_SHARE = 20


@dataclass(frozen=True)
class Examples:
    """Sequences of ids (T,) int32, each to be predicted from its token `first` on, and what they are.

    `training` and `held_out` are positions in them; no document is in both but the one where the text was divided.
    """

    sequences: tuple[np.ndarray, ...]
    first: tuple[int, ...]
    training: np.ndarray
    held_out: np.ndarray
    data: Data

    def targets(self, positions: Iterable[int]) -> int:
        """Return how many tokens of these examples are predicted."""
        return sum(len(self.sequences[one]) - self.first[one] for one in positions)

    @property
    def longest(self) -> int:
        """The most tokens in a sequence."""
        return max(map(len, self.sequences))


def load(
    src: str,
    stage: Stage,
    *,
    tokenizer: Any = None,
    dense: Callable[[], Any] | None = None,
    data_dir: Path | None = None,
    progress: Progress | None = None,
) -> Examples:
    """Return the examples that `src` names, for a stage: as many of them as it needs, where it says how many steps.

    `src`: a text or JSONL file, instructions as JSON or JSONL, `ids:FILE.jsonl`, a short name in the data folder, or
    `self` (sampled from the model that `dense` returns). Raises InputError for what is missing or malformed (with the
    line), for text without a tokenizer, and where nothing is left to learn from.
    """
    if src.startswith(texts.IDS):
        path = Path(src.removeprefix(texts.IDS))
        sequences = [np.asarray(ids, dtype=np.int32) for ids in texts.read_ids(path)]
        return _divided(sequences, [1] * len(sequences), f"{texts.IDS}{path.name}", "ids", stage)
    if src == calibration.SELF:
        return _sampled(stage, tokenizer, dense, progress)
    found = _instructions(src, data_dir)
    if found is not None:
        return _instructed(*found, stage, tokenizer)
    return _packed(texts.read_documents(src, data_dir), stage, tokenizer, progress)


def _instructions(src: str, data_dir: Path | None) -> tuple[Sequence[Instruction], str] | None:
    """Return the instructions that `src` names with what they are known by; None where it is text."""
    kinds = (*texts.SUFFIXES, ".json")
    asked = hub.parse(src, "calibration") if texts.on_hub(src, data_dir, kinds) else None
    if asked is not None:
        remote = instructions.from_hub(asked)
        return None if remote is None else (remote, asked.name)
    paths, name, _ = texts.locate(src, data_dir, kinds)
    if not all(map(instructions.holds, paths)):
        return None
    return [one for path in paths for one in instructions.read(path)], name


def _sampled(stage: Stage, tokenizer: Any, dense: Callable[[], Any] | None, progress: Progress | None) -> Examples:
    if stage.steps is None:
        raise InputError("data 'self' is sampled from the model and has no end; give --steps")
    drawn = calibration.load(
        calibration.SELF,
        tokenizer=tokenizer,
        model=dense() if dense is not None else None,
        samples=wanted(stage),
        length=stage.length,
        seed=stage.seed,
        progress=progress,
    )
    sequences = [ids.astype(np.int32) for ids in drawn.sequences]
    return _divided(sequences, [1] * len(sequences), calibration.SELF, "self", stage)


def _instructed(pairs: Sequence[Instruction], name: str, stage: Stage, tokenizer: Any) -> Examples:
    tokenize = calibration.tokenize_with(tokenizer, name)
    bos, eos = calibration.bos_id(tokenizer), getattr(tokenizer, "eos_token_id", None)
    prefix, suffix = [] if bos is None else [bos], [] if eos is None else [eos]
    sequences: list[np.ndarray] = []
    first: list[int] = []
    for pair in pairs:
        # As published: the prompt's own tokens are masked, and a text that is cut off does not end.
        masked = len(prefix) + len(tokenize(pair.prompt))
        ids = [*prefix, *tokenize(pair.prompt + pair.response), *suffix][: stage.length]
        if masked < len(ids):
            sequences.append(np.asarray(ids, dtype=np.int32))
            first.append(max(1, masked))
    skipped = len(pairs) - len(sequences)
    if not sequences:
        raise InputError(
            f"{name}: all {skipped} prompts fill the {stage.length} tokens that are read of an example, which leaves "
            "nothing to learn; give a larger --length"
        )
    return _divided(sequences, first, name, "instructions", stage, skipped)


def _packed(documents: texts.Documents, stage: Stage, tokenizer: Any, progress: Progress | None) -> Examples:
    tokenize = calibration.tokenize_with(tokenizer, documents.name)
    bos, eos = calibration.bos_id(tokenizer), getattr(tokenizer, "eos_token_id", None)
    before, after = ([bos], []) if bos is not None else ([], [] if eos is None else [eos])
    limit = None if stage.steps is None else wanted(stage) * stage.length
    parts: list[np.ndarray] = []
    tokens = 0
    for done, index in enumerate(np.random.default_rng(stage.seed).permutation(len(documents.texts))):
        parts.append(np.asarray([*before, *tokenize(documents.texts[index]), *after], dtype=np.int32))
        tokens += len(parts[-1])
        if progress is not None:
            progress(done + 1, len(documents.texts))
        if limit is not None and tokens >= limit:
            break
    stream = np.concatenate(parts)[:limit]
    windows = [stream[start : start + stage.length] for start in range(0, tokens - stage.length + 1, stage.length)]
    windows = [window for window in windows if len(window) == stage.length]
    if not windows:
        raise InputError(
            f"{documents.name}: {tokens} tokens fill no window of {stage.length}; give more text or a smaller --length"
        )
    return _divided(windows, [1] * len(windows), documents.name, "text", stage)


def wanted(stage: Stage) -> int:
    """Return how many examples a stage of a given number of steps can use, those that it holds out included."""
    assert stage.steps is not None
    trained = stage.steps * stage.batch
    return trained + min(stage.held_out, trained // (_SHARE - 1) + 1)


def _divided(
    sequences: list[np.ndarray], first: list[int], name: str, kind: str, stage: Stage, skipped: int = 0
) -> Examples:
    """Hold some examples out: the last windows of a text, whose neighbours know it, else random ones."""
    count = len(sequences)
    held = min(stage.held_out, count // _SHARE)
    order = np.arange(count) if kind == "text" else np.random.default_rng((stage.seed, 1)).permutation(count)
    told = [np.asarray(first, dtype=np.int64), *sequences]
    data = Data(
        source=name,
        kind=kind,
        digest=calibration.digest(told),
        examples=count,
        held_out=held,
        skipped=skipped,
        tokens=sum(map(len, sequences)),
        targets=sum(len(ids) - start for ids, start in zip(sequences, first, strict=True)),
    )
    return Examples(tuple(sequences), tuple(first), order[: count - held], order[count - held :], data)


# -- which examples a step takes --------------------------------------------------------------------------------------


def batch_at(step: int, examples: np.ndarray, stage: Stage) -> list[int]:
    """Return the examples of a step: a piece of one shuffled pass after the other, without end."""
    count = len(examples)
    wanted = range(step * stage.batch, (step + 1) * stage.batch)
    orders = {number: shuffled(count, stage.seed, number) for number in {one // count for one in wanted}}
    return [int(examples[orders[one // count][one % count]]) for one in wanted]


@lru_cache(maxsize=4)
def shuffled(count: int, seed: int, number: int) -> np.ndarray:
    """Return the order of pass `number` over `count` examples."""
    return np.random.default_rng((seed, 2, number)).permutation(count)


def micro_batches(chosen: Sequence[int], examples: Examples, rows: int) -> list[list[int]]:
    """Return a step's examples in pieces of at most `rows`, alike in length, so that little is padded."""
    by_length = sorted(chosen, key=lambda one: -len(examples.sequences[one]))
    return [by_length[start : start + rows] for start in range(0, len(by_length), rows)]


def collate(chosen: Sequence[int], examples: Examples) -> tuple[np.ndarray, np.ndarray]:
    """Return ids (B, T) int64, padded on the right with id 0, and which of them are predicted (B, T), as bool.

    Causal attention never looks right, so padding needs neither a mask nor a padding token.
    """
    longest = max(len(examples.sequences[one]) for one in chosen)
    if any(len(examples.sequences[one]) != longest for one in chosen):
        longest = -(-longest // _MULTIPLE) * _MULTIPLE
    ids_BT = np.zeros((len(chosen), longest), dtype=np.int64)
    counts_BT = np.zeros((len(chosen), longest), dtype=bool)
    for row, one in enumerate(chosen):
        ids = examples.sequences[one]
        ids_BT[row, : len(ids)] = ids
        counts_BT[row, examples.first[one] : len(ids)] = True
    return ids_BT, counts_BT


def alone(chosen: Iterable[int], examples: Examples) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield each example as a batch of its own, which nothing is padded in."""
    for one in chosen:
        ids_BT = examples.sequences[one][None].astype(np.int64)
        yield ids_BT, np.arange(ids_BT.shape[1])[None] >= examples.first[one]
