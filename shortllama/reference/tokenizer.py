"""The reference model's tokenizer: a byte-fallback BPE in the style of Llama's.

Why this style: every engine can carry it. Merges are derived from piece ranks the way SentencePiece scores
them, so that a reader that merges "the adjacent pair whose concatenation has the best score" (llama.cpp's SPM
tokenizer) and one that replays merges (transformers) agree on every text. That needs two properties, both by
construction here: pieces never cross the pre-token boundaries used in training, and every way to split a piece
into two pieces is a merge. Knows nothing of models.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tokenizers import Tokenizer

SPACE = "\u2581"
SPECIAL = ("<unk>", "<s>", "</s>")
# A word with its leading space, one digit, or one other character with its leading space; newlines are never
# part of a piece, so they come out as the byte token <0x0A>, as in Llama.
_PRETOKEN = re.compile(rf"{SPACE}?[^\W\d_]+|\d|{SPACE}?[^\w\s{SPACE}]|{SPACE}")


def pretokens(text: str) -> Iterator[str]:
    """Yield the units inside which pieces are learned, in order; characters outside any unit are dropped."""
    for line in text.splitlines():
        yield from _PRETOKEN.findall(SPACE + line.replace(" ", SPACE))


def train(texts: Iterable[str], vocabulary_size: int, *, min_character_count: int = 50) -> Tokenizer:
    """Return a trained tokenizer with exactly `vocabulary_size` tokens, ids 0-2 special, 3-258 bytes.

    Characters seen fewer than `min_character_count` times are left to the byte tokens. Deterministic.
    """
    from collections import Counter

    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

    counts = Counter(unit for text in texts for unit in pretokens(text))
    characters: Counter[str] = Counter()
    for unit, count in counts.items():
        for character in unit:
            characters[character] += count
    alphabet = sorted(c for c, n in characters.items() if n >= min_character_count)
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fixed = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size - len(fixed),
        initial_alphabet=alphabet,
        limit_alphabet=len(alphabet),
        show_progress=False,
    )
    # One line a repeated unit: the trainer counts units itself, so each is written as often as it occurs.
    learner.train_from_iterator(
        (" ".join([unit] * min(count, 1 << 14)) for unit, count in sorted(counts.items())), trainer
    )
    learned = sorted(learner.get_vocab().items(), key=lambda item: item[1])
    pieces = [*fixed, *(piece for piece, _ in learned)]
    if len(pieces) != vocabulary_size:
        raise ValueError(f"learned {len(pieces)} tokens where {vocabulary_size} were asked; give more text")
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    tokenizer = Tokenizer(
        models.BPE(
            vocab=vocabulary,
            merges=_merges(vocabulary, len(fixed)),
            unk_token="<unk>",
            byte_fallback=True,
            fuse_unk=True,
        )
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    tokenizer.add_special_tokens(list(SPECIAL))
    return tokenizer


def _merges(vocabulary: dict[str, int], first_learned: int) -> list[tuple[str, str]]:
    """Every split of every learned piece into two pieces, best-ranked piece first."""
    merges: list[tuple[str, str]] = []
    for piece, index in sorted(vocabulary.items(), key=lambda item: item[1]):
        if index < first_learned or len(piece) < 2:
            continue
        splits = ((piece[:cut], piece[cut:]) for cut in range(1, len(piece)))
        merges += sorted(
            (s for s in splits if s[0] in vocabulary and s[1] in vocabulary),
            key=lambda s: (vocabulary[s[0]], vocabulary[s[1]]),
        )
    return merges
