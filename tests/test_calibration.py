"""Calibration: what is drawn from text, ids and models, and how bad sources are answered."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shortllama import calibration, surgery, texts
from shortllama.errors import InputError


class Letters:
    """A tokenizer of one token a character; id 0 begins a text."""

    bos_token_id: int | None = 0

    def __call__(self, text: str, *, add_special_tokens: bool, verbose: bool) -> dict[str, list[int]]:
        assert not add_special_tokens
        return {"input_ids": [ord(letter) % 96 + 1 for letter in text]}


@pytest.fixture
def letters() -> Letters:
    return Letters()


@pytest.fixture
def book(tmp_path):
    path = tmp_path / "book.txt"
    path.write_text("".join(chr(33 + i % 90) for i in range(1000)))
    return path


# -- drawing ----------------------------------------------------------------------------------------------------------


@given(
    sizes=st.lists(st.integers(1, 60), min_size=1, max_size=8),
    samples=st.integers(1, 12),
    length=st.integers(2, 15),
    seed=st.integers(0, 9),
)
def test_windows_are_disjoint_pieces_of_documents(sizes, samples, length, seed):
    # Token value = its position in all documents put together, so that a window says where it came from.
    starts = np.cumsum([0, *sizes])
    documents = texts.Documents("made", tuple(str(i) for i in range(len(sizes))))

    def tokenize(text: str) -> list[int]:
        return list(range(starts[int(text)], starts[int(text) + 1]))

    available = sum(size // length for size in sizes)
    if available < samples:
        with pytest.raises(InputError, match=f"made: holds {available} windows of {length} tokens, {samples} were"):
            calibration.draw_windows(documents, tokenize, samples, length, seed)
        return
    windows = calibration.draw_windows(documents, tokenize, samples, length, seed)
    assert len(windows) == samples
    used = np.concatenate(windows)
    assert len(set(used.tolist())) == samples * length, "windows overlap"
    for window in windows:
        assert (np.diff(window) == 1).all()
        owner = np.searchsorted(starts, window, side="right")
        assert len(set(owner.tolist())) == 1, "a window crosses documents"
    fitting = sum(size >= length for size in sizes)
    owners = [int(np.searchsorted(starts, window[0], side="right")) for window in windows]
    assert len(set(owners)) == min(fitting, samples), "every document gives one window before any gives two"
    fewer = calibration.draw_windows(documents, tokenize, max(1, samples - 1), length, seed)
    assert all((a == b).all() for a, b in zip(fewer, windows, strict=False)), "the first windows depend on the count"


def test_equal_arguments_give_equal_ids_and_another_seed_does_not(book, letters):
    first = calibration.load(str(book), tokenizer=letters, samples=3, length=32)
    again = calibration.load(str(book), tokenizer=letters, samples=3, length=32)
    other = calibration.load(str(book), tokenizer=letters, samples=3, length=32, seed=1)
    assert first.description == again.description
    assert first.description["digest"] != other.description["digest"]


def test_description_names_the_file_without_its_path(book, letters):
    used = calibration.load(str(book), tokenizer=letters, samples=3, length=32)
    assert used.description == {
        "source": "book.txt",
        "digest": calibration.digest(used.sequences),
        "samples": 3,
        "length": 32,
        "tokens": 96,
        "seed": 0,
        "bos": "document",
    }
    assert used.tokens == 96


def test_bos_begins_a_document_or_every_window(tmp_path, letters):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "abcdefg"}\n')
    whole = calibration.load(str(path), tokenizer=letters, samples=1, length=8)
    assert whole.sequences[0].tolist() == [0, *letters("abcdefg", add_special_tokens=False, verbose=False)["input_ids"]]
    path.write_text('"abcdefgh"\n')
    every = calibration.load(str(path), tokenizer=letters, samples=2, length=4, bos="every")
    plain = sorted(tuple(s[1:].tolist()) for s in every.sequences)
    ids = letters("abcdefgh", add_special_tokens=False, verbose=False)["input_ids"]
    assert [s[0] for s in every.sequences] == [0, 0]
    assert plain == sorted([tuple(ids[0:3]), tuple(ids[4:7])])


def test_batches_keep_order_and_mix_no_lengths():
    sequences = [[1, 2], [3, 4], [5, 6], [7, 8, 9], [1, 1]]
    used = calibration.describe(sequences, "made", seed=None, bos=None)
    assert used.description["length"] is None
    assert [batch.tolist() for batch in used.batches(lambda length: 2)] == [
        [[1, 2], [3, 4]],
        [[5, 6]],
        [[7, 8, 9]],
        [[1, 1]],
    ]


def test_digest_separates_sequences():
    def of(sequences):
        return calibration.digest([np.array(s) for s in sequences])

    assert of([[1, 2], [3]]) != of([[1], [2, 3]])
    assert of([[1, 2]]) == calibration.digest([np.array([1, 2], dtype=np.int32)])


def test_logits_of_a_batch_stay_within_the_bound():
    assert calibration.rows_within(128, 32000) * 128 * 32000 * 4 <= calibration.LOGITS_BYTES
    assert calibration.rows_within(10**6, 10**6) == 1


# -- sources ----------------------------------------------------------------------------------------------------------


def test_ids_are_used_exactly_as_given_and_need_no_tokenizer(tmp_path):
    path = tmp_path / "ids.jsonl"
    path.write_text("[1, 5, 9]\n\n[2, 3]\n")
    used = calibration.load(f"ids:{path}", samples=99, length=77)
    assert [s.tolist() for s in used.sequences] == [[1, 5, 9], [2, 3]]
    assert used.description["source"] == "ids:ids.jsonl"
    assert used.description["seed"] is None


def test_documents_of_a_text_file_are_separated_by_endoftext_lines(tmp_path):
    path = tmp_path / "stories.txt"
    path.write_text("One.\ntwo\n<|endoftext|>\nThree <|endoftext|> stays.\n<|endoftext|>\n\n")
    assert texts.read_documents(str(path)).texts == ("One.\ntwo", "Three <|endoftext|> stays.")
    path.write_text("  kept as it is \n")
    assert texts.read_documents(str(path)).texts == ("  kept as it is \n",)


def test_short_names_are_found_in_the_data_folder(tmp_path, monkeypatch):
    (tmp_path / "wikitext2").mkdir()
    (tmp_path / "wikitext2" / "test.txt").write_text("test text")
    (tmp_path / "wikitext2" / "wiki.valid.raw").write_text("valid text")
    (tmp_path / "wikitext2" / "README").write_text("not text")
    (tmp_path / "ptb.jsonl").write_text('{"text": "penn"}')
    both = texts.read_documents("wikitext2", tmp_path)
    assert (both.name, both.texts, both.split) == ("wikitext2", ("test text", "valid text"), None)
    monkeypatch.setenv("SHORTLLAMA_DATA", str(tmp_path))
    valid = texts.read_documents("wikitext2:valid")
    assert (valid.name, valid.texts, valid.split) == ("wikitext2:valid", ("valid text",), "valid")
    assert texts.read_documents("ptb").texts == ("penn",)
    (tmp_path / "wikitext2").rename(tmp_path / "stories")
    with pytest.raises(InputError, match="holds no stories with split 'train'"):
        texts.read_documents("stories:train")


def test_self_calibration_begins_with_bos_and_stays_in_the_vocabulary(tiny_shape):
    model = surgery.build(tiny_shape, std=0.15)
    model.config.bos_token_id = 7
    used = calibration.load(model=model, samples=3, length=9)
    again = calibration.load(model=model, samples=3, length=9)
    assert used.description == again.description
    assert used.description["source"] == "self"
    ids = np.stack(used.sequences)
    assert ids.shape == (3, 9)
    assert (ids[:, 0] == 7).all()
    assert ids.max() < 97
    assert len(set(ids[:, 1:].flatten().tolist())) > 5, "sampling repeats one token"
    tokenizer = SimpleNamespace(bos_token_id=3)
    assert calibration.load(model=model, tokenizer=tokenizer, samples=1, length=4).sequences[0][0] == 3


# -- bad input: one line ----------------------------------------------------------------------------------------------


def one_line(error: pytest.ExceptionInfo) -> str:
    message = str(error.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("short.txt", "abc", "short.txt: holds 0 windows of 128 tokens, 10 were asked for"),
        ("empty.txt", " \n\n", "holds no text"),
        ("bad.jsonl", '{"text": "a"}\n{"text": \n', "bad.jsonl:2: not JSON"),
        ("keys.jsonl", '{"instruction": "a"}\n', "keys.jsonl:1: saw keys instruction"),
        ("number.jsonl", '"a"\n\n17\n', "number.jsonl:3: saw 17"),
        ("latin.txt", b"caf\xe9", "not UTF-8 text (byte 3)"),
    ],
)
def test_bad_text_is_named_in_one_line(tmp_path, letters, name, content, expected):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError) as error:
        calibration.load(str(path), tokenizer=letters)
    assert expected in one_line(error)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("[1, 2]\n[1, -2]\n", ":2: saw '[1, -2]'; expected a list of token ids"),
        ("[1, 2]\n[1, 2.5]\n", ":2: saw"),
        ("[1, true]\n", ":1: saw"),
        ('[1, 2]\n\n"text"\n', ":3: saw"),
        ("[1, 2]\n[3]\n", ":2: 1 token ids; at least 2"),
        ("[1, 2]\n[1,\n", ":2: not JSON"),
        ("\n", "holds no token ids"),
    ],
)
def test_bad_ids_are_named_by_line(tmp_path, content, expected):
    path = tmp_path / "ids.jsonl"
    path.write_text(content)
    with pytest.raises(InputError) as error:
        calibration.load(f"ids:{path}")
    assert expected in one_line(error)


def test_what_is_missing_is_named(tmp_path, book, letters, monkeypatch):
    monkeypatch.delenv("SHORTLLAMA_DATA", raising=False)
    cases = [
        (dict(src=str(book)), InputError, "without a tokenizer; use ids:FILE.jsonl or 'self'"),
        (dict(src="self"), InputError, "no model is loaded"),
        (dict(src="self", model=SimpleNamespace(config=SimpleNamespace(bos_token_id=None))), InputError, "needs a BOS"),
        (dict(src="gone.txt", tokenizer=letters), InputError, "no such file"),
        (dict(src=f"ids:{tmp_path}/gone.jsonl"), InputError, "cannot be read (No such file"),
        (dict(src=str(tmp_path), tokenizer=letters), InputError, "a folder"),
        (dict(src="stories", tokenizer=letters), InputError, "no data folder to look it up in"),
        (dict(src="stories", tokenizer=letters, data_dir=tmp_path), InputError, "holds no stories"),
        (dict(src=str(book), tokenizer=letters, samples=0), InputError, "at least 1 sample"),
        (dict(src=str(book), tokenizer=letters, length=1), InputError, "of 2 tokens"),
    ]
    for arguments, kind, expected in cases:
        with pytest.raises(kind) as error:
            calibration.load(**arguments)
        assert expected in one_line(error), arguments
    letters.bos_token_id = None
    with pytest.raises(InputError, match="every window is to have a BOS token in front, and this tokenizer has none"):
        calibration.load(str(book), tokenizer=letters, samples=1, length=8, bos="every")


@pytest.mark.parametrize(("family", "policy"), [("llama", "document"), ("gemma2", "every"), ("gemma3_text", "every")])
def test_a_family_that_needs_a_bos_gets_it_in_every_window(book, letters, family: str, policy: str):
    model = SimpleNamespace(config=SimpleNamespace(model_type=family))
    drawn = calibration.load(str(book), tokenizer=letters, model=model, samples=3, length=32)
    assert drawn.description["bos"] == policy
    assert all(len(ids) == 32 for ids in drawn.sequences)
    if policy == "every":
        assert all(ids[0] == 0 for ids in drawn.sequences)
        chosen = calibration.load(str(book), tokenizer=letters, model=model, samples=3, length=32, bos="document")
        assert not all(ids[0] == 0 for ids in chosen.sequences)
    letters.bos_token_id = None
    if policy == "document":
        calibration.load(str(book), tokenizer=letters, model=model, samples=3, length=32)
        return
    with pytest.raises(InputError, match=rf"book.txt: {family} models need a BOS token in front") as error:
        calibration.load(str(book), tokenizer=letters, model=model, samples=3, length=32)
    assert "ids:FILE.jsonl" in one_line(error)


def test_ids_outside_the_vocabulary_name_the_sequence():
    with pytest.raises(InputError, match=r"x: sequence 2 holds token id 97, .* has 97 entries"):
        texts.check_vocabulary([[1, 2], [97, 3]], 97, "x")


def test_jsonl_lines_may_hold_line_separators(tmp_path):
    """A Unicode line separator is legal inside a JSON string and must not split the line."""
    path = tmp_path / "u.jsonl"
    path.write_text(json.dumps({"text": "a\u2028b"}, ensure_ascii=False) + "\n", encoding="utf-8")
    assert texts.read_documents(str(path)).texts == ("a\u2028b",)
