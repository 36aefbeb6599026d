"""Data sets on the hub: what is asked of the library, what its rows become, and how its failures are answered."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from shortllama import hub, texts
from shortllama.errors import InputError, ShortllamaError, UnsupportedError

WORDS = [{"text": word} for word in ("one", "", "two", " ", "three")]


class Library:
    """A stand-in for `datasets` that records how it is asked and streams `rows`."""

    __version__ = "5.2.0"

    def __init__(self, rows: list[dict[str, Any]] | Callable[[], Iterator[dict[str, Any]]]) -> None:
        self.rows = rows
        self.asked: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def load_dataset(self, *args: Any, **kwargs: Any) -> Any:
        self.asked.append((args, kwargs))
        return self.rows if isinstance(self.rows, list) else self.rows()


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch):
    """Return install(rows) -> Library, which then is what `import datasets` gives."""
    monkeypatch.delenv("SHORTLLAMA_DATA", raising=False)

    def install(rows: Any) -> Library:
        made = Library(rows)
        monkeypatch.setitem(sys.modules, "datasets", made)  # type: ignore[arg-type]
        return made

    return install


# -- what is asked ----------------------------------------------------------------------------------------------------

WIKITEXT = ("Salesforce/wikitext", "wikitext-2-raw-v1")
PTB = ("ptb-text-only/ptb_text_only", None)


@pytest.mark.parametrize(
    ("src", "use", "where", "split", "revision"),
    [
        ("hf:some/set", "calibration", ("some/set", None), "train", None),
        ("hf:some/set", "evaluation", ("some/set", None), "test", None),
        ("hf:some/set:en", "calibration", ("some/set", "en"), "train", None),
        ("hf:some/set:en:held", "evaluation", ("some/set", "en"), "held", None),
        ("hf:some/set::held", "calibration", ("some/set", None), "held", None),
        ("wikitext2", "calibration", WIKITEXT, "train", None),
        ("wikitext2", "evaluation", WIKITEXT, "test", None),
        ("wikitext2:validation", "evaluation", WIKITEXT, "validation", None),
        ("ptb", "evaluation", PTB, "validation", "refs/convert/parquet"),
        ("c4", "evaluation", ("allenai/c4", "en"), "validation", None),
        ("bookcorpus", "calibration", ("rojagtap/bookcorpus", None), "train", None),
        ("alpaca", "calibration", ("yahma/alpaca-cleaned", None), "train", None),
    ],
)
def test_a_source_asks_for_one_split_as_a_stream_without_scripts(library, src, use, where, split, revision):
    row = dict.fromkeys(("text", "sentence", "instruction", "input", "output"), "x")
    seen = library([row])
    found = texts.read_documents(src, use=use)
    assert seen.asked == [(where, {"split": split, "streaming": True, "revision": revision})]
    assert found.split == split
    assert found.name == f"hf:{where[0]}:{where[1] or ''}:{split}"


@pytest.mark.parametrize("src", ["hf:", "hf::en", "hf:a:b:c:d"])
def test_a_source_with_other_parts_is_refused(library, src: str):
    seen = library([])
    with pytest.raises(InputError, match="expected hf:NAME"):
        texts.read_documents(src)
    assert seen.asked == []


def test_the_data_folder_comes_first(library, tmp_path: Path):
    seen = library(WORDS)
    (tmp_path / "c4").mkdir()
    (tmp_path / "c4" / "train.jsonl").write_text(json.dumps("local"))
    assert texts.read_documents("c4", tmp_path).texts == ("local",)
    assert texts.read_documents("c4:train", tmp_path).texts == ("local",)
    assert seen.asked == []
    assert texts.read_documents("c4:validation", tmp_path).texts == ("one", "two", "three")
    assert len(seen.asked) == 1


# -- what rows become -------------------------------------------------------------------------------------------------


def test_rows_are_documents_or_pieces_of_one(library):
    library(WORDS)
    assert texts.read_documents("c4").texts == ("one", "two", "three")
    assert texts.read_documents("wikitext2").texts == ("one\n\n\n\ntwo\n\n \n\nthree",)
    assert texts.read_documents("hf:x").texts == ("one", "two", "three")


def test_the_columns_of_text(library):
    library([{"instruction": "say", "input": "", "output": "yes"}, {"instruction": "a", "input": "b", "output": "c"}])
    assert texts.read_documents("alpaca").texts == ("say\nyes", "a\nb\nc")
    library([{"id": 3, "text": "t", "url": "u"}])
    assert texts.read_documents("hf:x").texts == ("t",)
    library([{"id": 3, "body": "b"}])
    assert texts.read_documents("hf:x").texts == ("b",)


def test_no_more_is_streamed_than_is_taken(library, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(hub, "CHARACTERS", 25)
    drawn: list[int] = []

    def endless() -> Iterator[dict[str, str]]:
        while True:
            drawn.append(1)
            yield {"text": f"{len(drawn):010}"}

    library(endless)
    found = texts.read_documents("c4")
    assert found.texts == ("0000000001", "0000000002", "00000")
    assert len(drawn) == 3
    assert found.name == "hf:allenai/c4:en:train (its first 0 Mi characters)"
    library([{"text": "x" * 25}])
    assert texts.read_documents("c4") == texts.Documents("hf:allenai/c4:en:train", ("x" * 25,), "train")


# -- what goes wrong --------------------------------------------------------------------------------------------------


def fails(error: Exception) -> Callable[[], Iterator[dict[str, Any]]]:
    """A stream that breaks after a row."""

    def rows() -> Iterator[dict[str, Any]]:
        yield {"text": "x"}
        raise error

    return rows


def no_stream(error: Exception) -> Callable[[], Iterator[dict[str, Any]]]:
    def rows() -> Iterator[dict[str, Any]]:
        logging.getLogger("huggingface_hub").warning("Retrying in 1s")
        raise error

    return rows


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        (no_stream(ConnectionError("Couldn't reach 'x'\non the Hub.")), "Couldn't reach 'x' on the Hub; save its text"),
        (no_stream(RuntimeError("Dataset scripts are no longer supported, but found x.py")), "scripts are no longer"),
        (fails(ValueError("Bad split: tset")), "Bad split: tset"),
        (fails(TimeoutError()), "TimeoutError"),
        ([], "holds no text"),
        ([{"text": " "}], "holds no text"),
        ([{"a": "x", "b": "y"}], "none of its columns a, b is 'text'"),
        ([{"text": "x"}, {"text": None, "id": 1}], "no text in 'text', their columns are text, id"),
    ],
)
def test_failures_are_one_line_with_the_local_way_out(library, caplog, rows, says: str):
    library(rows)
    before = logging.getLogger("huggingface_hub").level
    with pytest.raises(InputError) as error:
        texts.read_documents("hf:x")
    line = str(error.value)
    assert says in line
    assert "file" in line
    assert "\n" not in line
    assert caplog.records == []
    assert logging.getLogger("huggingface_hub").level == before


@pytest.mark.parametrize(("version", "says"), [(None, "shortllama[eval]"), ("3.6.0", "3.6.0 may run the scripts")])
@pytest.mark.parametrize("src", ["hf:some/set", "wikitext2"])
def test_without_the_library_the_local_way_is_named(library, monkeypatch, tmp_path, version, says: str, src: str):
    monkeypatch.setattr(library(WORDS), "__version__", version)
    if version is None:
        monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UnsupportedError) as error:
        texts.read_documents(src, tmp_path)
    assert says in str(error.value)
    assert "--data-dir" in str(error.value)
    assert (f"'wikitext2', which {tmp_path} does not hold:" in str(error.value)) == (src == "wikitext2")
    assert "\n" not in str(error.value)


# -- the library itself -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["jsonl", "parquet"])
def test_the_real_library_streams_a_folder(tmp_path: Path, form: str):
    pytest.importorskip("datasets", reason="the extra `eval` is not installed")
    folder = tmp_path / "made"
    folder.mkdir()
    if form == "jsonl":
        (folder / "train.jsonl").write_text("\n".join(map(json.dumps, WORDS)))
    else:
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(WORDS), folder / "train.parquet")
    found = texts.read_documents(f"hf:{folder}")
    assert found == texts.Documents("hf:made::train", ("one", "two", "three"), "train")
    for src, says in ((f"hf:{folder}::tset", "tset"), (f"hf:{folder}:other", "other"), ("hf:no/such", "no/such")):
        with pytest.raises(ShortllamaError) as error:
            texts.read_documents(src)
        assert says in str(error.value)
        assert "\n" not in str(error.value)


def test_a_script_is_never_run(tmp_path: Path):
    pytest.importorskip("datasets", reason="the extra `eval` is not installed")
    folder = tmp_path / "made"
    folder.mkdir()
    (folder / "made.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    with pytest.raises(ShortllamaError):
        texts.read_documents(f"hf:{folder}")
    assert not (tmp_path / "ran").exists()
