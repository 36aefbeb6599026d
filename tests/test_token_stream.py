"""Tokens of a text in overlapping chunks are those of the whole text, whatever the tokenizer; so are its windows."""

from __future__ import annotations

import random
from itertools import pairwise

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from shortllama.errors import InputError
from shortllama.evaluation import tokens
from tests.test_calibration import Letters

WORDS = "the of and naïve 日本語 is a pruned model's width, depth; 😀 it was <unk> 12 3.5 — l'été".split()


def prose(size: int, seed: int = 0) -> str:
    random_ = random.Random(seed)
    gaps = [" ", " ", " ", " ", "\n", "\n\n", "  ", "\t", "\u3000", ""]
    return "".join(random_.choice(WORDS) + random_.choice(gaps) for _ in range(size))


def trained(model, trainer, pre=None, normalizer=None) -> PreTrainedTokenizerFast:
    tokenizer = tokenizers.Tokenizer(model)
    if pre is not None:
        tokenizer.pre_tokenizer = pre
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.train_from_iterator([prose(4000, seed=9)[start : start + 500] for start in range(0, 8000, 500)], trainer)
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


def byte_level():
    """As GPT-2 and Llama 3: words with the space before them, in bytes."""
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=["<unk>"], initial_alphabet=alphabet)
    return trained(models.BPE(), trainer, pre_tokenizers.ByteLevel(add_prefix_space=False))


def metaspace():
    """As Llama 2: spaces are letters, one more before the text, merges across all of it, bytes for the unknown."""
    trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=["<unk>", *(f"<0x{byte:02X}>" for byte in range(256))])
    normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return trained(models.BPE(byte_fallback=True, unk_token="<unk>"), trainer, normalizer=normalizer)


def unigram():
    """As T5: the likeliest cut of each word."""
    trainer = trainers.UnigramTrainer(vocab_size=200, special_tokens=["<unk>"], unk_token="<unk>")
    return trained(models.Unigram(), trainer, pre_tokenizers.Metaspace(prepend_scheme="first"))


def composed():
    """As Qwen: the text is normalized to composed characters first."""
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["<unk>"], initial_alphabet=alphabet)
    return trained(models.BPE(), trainer, pre_tokenizers.ByteLevel(add_prefix_space=False), normalizers.NFC())


@pytest.fixture(scope="module", params=[byte_level, metaspace, unigram, composed], ids=lambda make: make.__name__)
def tokenizer(request):
    return request.param()


@pytest.fixture
def small(monkeypatch):
    """Chunks of a few hundred characters, so that a short text has many."""
    monkeypatch.setattr(tokens, "OVERLAP", 120)


def rows_of(text: str, tokenizer, cuts=(), chunk: int = 300) -> np.ndarray:
    edges = [0, *sorted(cuts), len(text)]
    return np.concatenate(list(tokens.tokenize((text[a:b] for a, b in pairwise(edges)), tokenizer, "x", chunk)))


@settings(max_examples=25)
@given(size=st.integers(1, 900), seed=st.integers(0, 99), data=st.data())
def test_tokens_in_chunks_are_those_of_the_whole_text(tokenizer, size, seed, data):
    text = prose(size, seed)
    cuts = data.draw(st.lists(st.integers(0, len(text)), max_size=40))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokens, "OVERLAP", 120)
        rows_N3 = rows_of(text, tokenizer, cuts)
    whole = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    assert rows_N3[:, 0].tolist() == whole
    # What follows the last token, which only blanks can, is covered by none.
    assert len(text.rstrip().encode()) <= rows_N3[:, 1].sum() <= len(text.encode())
    assert rows_N3[:, 2].sum() == len(text.split())
    assert rows_N3.min() >= 0


def test_a_long_text_is_tokenized_in_blocks(tokenizer, small):
    text = prose(3000)
    pieces = [text[start : start + 50] for start in range(0, len(text), 50)]
    blocks = list(tokens.tokenize(pieces, tokenizer, "x", 300))
    assert len(blocks) > 20
    assert max(map(len, blocks)) < 700


def test_what_never_agrees_is_tokenized_together(small):
    """One letter without end: with merges across it, no two chunks need to cut it at the same places."""
    model = models.BPE(vocab={"a": 0, "b": 1, "aa": 2, "aaa": 3}, merges=[("a", "a"), ("aa", "a")])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizers.Tokenizer(model))
    text = "b" * 7 + "a" * 1501 + "b" * 1000
    assert rows_of(text, tokenizer, range(0, len(text), 10))[:, 0].tolist() == tokenizer(text)["input_ids"]


def test_bytes_and_words_belong_to_the_token_that_covers_them(tokenizer):
    rows_N3 = rows_of("it was  naïve", tokenizer)
    assert rows_N3[:, 1].sum() == len("it was  naïve".encode())
    assert rows_N3[:, 2].sum() == 3


def test_a_tokenizer_without_offsets_gets_the_whole_text_and_counts_nothing():
    blocks = list(tokens.tokenize(iter(["ab", "c"]), Letters(), "x"))
    assert [block.tolist() for block in blocks] == [[[ord(c) % 96 + 1, 0, 0] for c in "abc"]]
    assert not tokens.counts_text(Letters())


def test_no_tokenizer_is_refused():
    with pytest.raises(InputError, match="x is text, but this model comes without a tokenizer"):
        list(tokens.tokenize(["a"], None, "x"))


@pytest.mark.data
@pytest.mark.parametrize("name", ["wikitext2_raw/wiki.test.raw", "tinystories/tinystories_sample.txt"])
def test_real_text_with_real_tokenizers(data_dir, stories, name):
    from transformers import AutoTokenizer

    from shortllama.sources import REFERENCE_FOLDER

    text = (data_dir / name).read_text()[:150_000]
    for folder in (stories, REFERENCE_FOLDER):
        tokenizer = AutoTokenizer.from_pretrained(folder)
        rows_N3 = rows_of(text, tokenizer, range(0, len(text), 999), chunk=8000)
        assert rows_N3[:, 0].tolist() == tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        assert rows_N3[:, 1].sum() == len(text.encode())
        assert rows_N3[:, 2].sum() == len(text.split())


class Drifting:
    """One token a character, which is another one within 80 characters of the start of what is tokenized."""

    is_fast = True

    def __call__(self, text: str, *, add_special_tokens: bool, verbose: bool, return_offsets_mapping: bool = False):
        ids = [ord(letter) + (1000 if at < 80 else 0) for at, letter in enumerate(text)]
        return {"input_ids": ids, "offset_mapping": [(at, at + 1) for at in range(len(text))]}


def test_chunks_are_joined_where_they_agree_and_not_in_the_middle(small):
    text = prose(400)
    expected = Drifting()(text, add_special_tokens=False, verbose=False)["input_ids"]
    assert rows_of(text, Drifting(), range(0, len(text), 7))[:, 0].tolist() == expected


class Overlapping:
    """Tokens that cover the same characters twice."""

    is_fast = True

    def __call__(self, text: str, *, add_special_tokens: bool, verbose: bool, return_offsets_mapping: bool = False):
        return {"input_ids": [1, 2, 3], "offset_mapping": [(0, 3), (1, 2), (3, 4)]}


def test_no_byte_is_counted_twice():
    assert rows_of("a bc", Overlapping())[:, 1:].tolist() == [[3, 2], [0, 0], [1, 0]]
