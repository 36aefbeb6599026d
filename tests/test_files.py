from __future__ import annotations

import errno
import os
from pathlib import Path

import msgspec
import pytest

from shortllama import files
from shortllama.errors import InputError


class Inner(msgspec.Struct, forbid_unknown_fields=True):
    size: int
    rate: float = 1.0


class Outer(msgspec.Struct, forbid_unknown_fields=True):
    name: str
    parts: tuple[Inner, ...] = ()
    table: dict[str, Inner] = {}


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ('{"nam": "a"}', "doc: unknown key $.nam; did you mean 'name'?"),
        ('{"name": "a", "parts": [{"size": 1}, {"siz": 2}]}', "doc: unknown key $.parts[1].siz; did you mean 'size'?"),
        ('{"name": "a", "zzz": 1}', "doc: unknown key $.zzz"),
        ('{"name": 5}', "doc: $.name: Expected `str`, got `int`, saw '5'"),
        ('{"name": "a", "parts": [{"size": 1.5}]}', "doc: $.parts[0].size: Expected `int`, got `float`, saw '1.5'"),
        ("{}", "doc: $: Object missing required field `name`"),
        ('{"name": "a"', "doc: not readable: Input data was truncated; was it cut off or edited by hand?"),
        ("", "doc: not readable"),
    ],
)
def test_a_broken_document_is_refused_by_path_value_and_nearest_name(text: str, problem: str) -> None:
    with pytest.raises(InputError) as caught:
        files.decode_json(text.encode(), Outer, "doc")
    assert str(caught.value).startswith(problem)


def test_toml_errors_read_alike() -> None:
    with pytest.raises(InputError, match=r"doc: unknown key \$\.nam; did you mean 'name'"):
        files.decode_toml(b"nam = 'a'", Outer, "doc")
    with pytest.raises(InputError, match="doc: not readable"):
        files.decode_toml(b"name = [", Outer, "doc")
    with pytest.raises(InputError, match="doc: not readable"):
        files.decode_toml(b"\xff\xfe", Outer, "doc")


def test_encoding_is_deterministic_and_ends_in_a_newline() -> None:
    one = files.encode_json({"b": 1, "a": [1.5, None]})
    assert (
        one == files.encode_json({"a": [1.5, None], "b": 1}) == b'{\n  "a": [\n    1.5,\n    null\n  ],\n  "b": 1\n}\n'
    )


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_reading_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"none: cannot be read \(No such file"):
        files.read_bytes(tmp_path / "none")
    with pytest.raises(InputError, match=r"cannot be read \(Is a directory"):
        files.read_bytes(tmp_path)


def test_writing_replaces_whole_files(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    files.write_atomically(path, b"one")
    files.write_atomically(path, b"two")
    assert path.read_bytes() == b"two"
    assert names(tmp_path) == ["a.json"]


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_full_disk_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(b"old")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, step, full)
    with pytest.raises(InputError, match=r"a.json: cannot be written \(No space left on device\)"):
        files.write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["a.json"]


def test_writing_into_a_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"cannot be written \(No such file or directory\)"):
        files.write_atomically(tmp_path / "none" / "a.json", b"")


def test_a_new_folder_appears_only_when_complete(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    with files.new_folder(out, "plan.json") as folder:
        (folder / "plan.json").write_text("1")
        assert not out.exists()
    assert names(out) == ["plan.json"]
    assert names(out.parent) == ["out"]


def test_a_failure_leaves_the_old_folder_as_it_was(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "plan.json").write_text("old")

    def interrupted() -> None:
        with files.new_folder(out, "plan.json") as folder:
            (folder / "half").write_text("")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert (out / "plan.json").read_text() == "old"
    assert names(tmp_path) == ["out"]


def test_our_own_folder_is_replaced_whole(tmp_path: Path) -> None:
    out = tmp_path / "out"
    for number in range(2):
        with files.new_folder(out, "plan.json") as folder:
            (folder / "plan.json").write_text(str(number))
            (folder / f"part{number}").write_text("")
    assert names(out) == ["part1", "plan.json"]
    assert names(tmp_path) == ["out"]


def test_a_folder_that_is_not_ours_is_never_touched(tmp_path: Path) -> None:
    out = tmp_path / "thesis"
    out.mkdir()
    (out / "chapter1").write_text("dear reader")
    with (
        pytest.raises(InputError, match=r"exists and holds no plan.json, so it is not ours"),
        files.new_folder(out, "plan.json"),
    ):
        pytest.fail("the work must not start")
    with pytest.raises(InputError, match="is a file; give a folder"):
        files.check_folder(out / "chapter1", "plan.json")
    assert names(out) == ["chapter1"]
    files.check_folder(tmp_path / "new", "plan.json")


def test_a_folder_in_a_place_that_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"), files.new_folder(tmp_path / "file" / "out", "plan.json"):
        pytest.fail("the work must not start")
