"""Documents in pieces: joined, they are the documents of the file, however it is cut."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shortllama import pieces
from shortllama.errors import InputError
from shortllama.pieces import Reading

SEPARATOR = "<|endoftext|>"


def whole(*paths) -> list[str]:
    return ["".join(document) for document in Reading(paths)]


def documents_of(text: str) -> list[str]:
    """What a text file holds, said in one regular expression over the whole of it."""
    parts = re.split(r"(?m)^<\|endoftext\|>[ \t]*$", text)
    return [part if len(parts) == 1 else part.strip() for part in parts if part.strip()]


parts = st.sampled_from(
    ["a", "é", "日本", "😀", " ", "\t", "\n", "\n\n", SEPARATOR, f"\n{SEPARATOR}\n", f"{SEPARATOR} \n", "x" * 40]
)


@given(st.lists(parts, max_size=25).map("".join), st.integers(64, 99))
def test_joined_pieces_are_the_documents_however_the_file_is_read(tmp_path_factory, text, size):
    path = tmp_path_factory.mktemp("t") / "t.txt"
    path.write_text(text, newline="")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pieces, "PIECE_BYTES", size)
        assert whole(path) == documents_of(text)
        found = list(Reading([path]))
        assert len(found) == len(documents_of(text)), "documents that are not consumed are skipped"


def test_long_lines_come_in_pieces(tmp_path):
    path = tmp_path / "long.txt"
    path.write_text("日" * (1 << 16))
    lengths = [len(piece.encode()) for document in Reading([path]) for piece in document]
    assert len(lengths) == 3
    assert max(lengths) <= pieces.PIECE_BYTES + 3, "with the start of a character that the piece before cut in two"


def test_files_follow_one_another_and_the_position_is_told(tmp_path):
    (tmp_path / "a.txt").write_text(f"one\n{SEPARATOR}\ntwo")
    (tmp_path / "b.jsonl").write_text('"three"\n\n{"text": "four"}\n"  "\n')
    reading = Reading([tmp_path / "a.txt", tmp_path / "b.jsonl"])
    assert ["".join(document) for document in reading] == ["one", "two", "three", "four"]
    assert reading.position == reading.size == sum(path.stat().st_size for path in tmp_path.iterdir())
    assert ["".join(document) for document in reading][:1] == ["one"], "it can be read again"


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("t.txt", b"ab\ncd\xff", r"t\.txt: not UTF-8 text \(byte 5\)"),
        ("t.txt", "ab\né".encode()[:-1], r"t\.txt: not UTF-8 text \(byte 3\)"),
        ("t.jsonl", b'"a"\n{"text": 3}\n', r't\.jsonl:2: saw keys text; expected a string or an object with "text"'),
        ("t.jsonl", b'"a"\n\n[1\n', r"t\.jsonl:3: not JSON"),
        ("t.jsonl", b'"\xff"\n', r"t\.jsonl:1: not JSON \(not UTF-8 text\)"),
    ],
)
def test_what_is_not_text_is_named(tmp_path, name, data, message):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(InputError, match=message):
        whole(tmp_path / name)
