"""Text of data sets on the Hugging Face hub, streamed through the `datasets` library (extra `eval`).

Never by a script: from its version 4 on that library runs none, and an older one is refused. Knows no tokenizer, and
imports the library only when a data set is really read.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import msgspec

from shortllama.errors import InputError, UnsupportedError

Use = Literal["calibration", "evaluation"]

PREFIX = "hf:"
LOCAL = "save its text to a file and give that, or a data folder that holds it (--data-dir)"

# The most text that is taken, from the start of a split: all of WikiText-2, PTB and Alpaca, some 15,000 pages of C4.
CHARACTERS = 32 * 2**20

_OLDEST = 4


class DataSet(msgspec.Struct, frozen=True):
    """Where a text is on the hub, and how its rows become documents.

    `splits`: the one for each use where none is asked for; the published perplexities are on held-out text. `fields`:
    the columns of a row that are its text, joined by a line break; none: the column `text`, or the only one of strings.
    `joint`: rows are paragraphs or sentences of one text, joined by a blank line (empty rows too), as the papers do
    before they tokenize; else each row is a document.
    """

    name: str
    config: str | None = None
    splits: tuple[str, str] = ("train", "test")
    fields: tuple[str, ...] = ()
    joint: bool = False
    revision: str | None = None


# Short names. The first homes of PTB and BookCorpus hold scripts: of the one the hub keeps a copy as plain tables, of
# the other a mirror is read.
DATA_SETS = {
    "wikitext2": DataSet("Salesforce/wikitext", "wikitext-2-raw-v1", fields=("text",), joint=True),
    "ptb": DataSet(
        "ptb-text-only/ptb_text_only",
        splits=("train", "validation"),
        fields=("sentence",),
        joint=True,
        revision="refs/convert/parquet",
    ),
    "c4": DataSet("allenai/c4", "en", ("train", "validation"), ("text",)),
    "bookcorpus": DataSet("rojagtap/bookcorpus", splits=("train", "train"), fields=("text",)),
    "alpaca": DataSet("yahma/alpaca-cleaned", splits=("train", "train"), fields=("instruction", "input", "output")),
}


class Asked(msgspec.Struct, frozen=True):
    """A data set and the split to read. `called`: what errors call it, which begins with how the user named it."""

    called: str
    data: DataSet
    split: str

    @property
    def name(self) -> str:
        """What the text is known by: `hf:NAME:CONFIG:SPLIT`; of a local folder the last part only (no host paths)."""
        folder = Path(self.data.name)
        name = folder.resolve().name if folder.is_dir() else self.data.name
        return f"{PREFIX}{name}:{self.data.config or ''}:{self.split}"


def parse(src: str, use: Use) -> Asked | None:
    """Return what `hf:NAME[:CONFIG[:SPLIT]]` or a short name with an optional split asks for; None for other names.

    `CONFIG` may be left empty. Raises InputError for a name that is empty, or with too many parts.
    """
    index = 0 if use == "calibration" else 1
    if src.startswith(PREFIX):
        name, *more = src.removeprefix(PREFIX).split(":")
        if not name or len(more) > 2:
            raise InputError(f"text source {src!r}: expected hf:NAME[:CONFIG[:SPLIT]], such as hf:allenai/c4:en:train")
        config, split = [*more, "", ""][:2]
        data = DataSet(name, config or None)
        return Asked(f"text source {src!r}", data, split or data.splits[index])
    short, _, split = src.partition(":")
    if short not in DATA_SETS:
        return None
    data = DATA_SETS[short]
    return Asked(f"text source {src!r}", data, split or data.splits[index])


def read(asked: Asked) -> tuple[str, tuple[str, ...]]:
    """Return the name of what is read and its documents, none of them blank: at most `CHARACTERS`, streamed.

    A name whose text ended there says so. Raises UnsupportedError without the library, and InputError for what cannot
    be reached, found, or is no text.
    """
    data = asked.data
    taken: list[str] = []
    left = CHARACTERS
    for text in _texts(asked):
        taken.append(text[:left])
        left -= len(text)
        if left < 0:
            return f"{asked.name} (its first {CHARACTERS >> 20} Mi characters)", _documents(taken, data.joint)
    return asked.name, _documents(taken, data.joint)


def rows(asked: Asked) -> Iterator[dict[str, Any]]:
    """Yield the rows of what is asked for, one after the other, as they are and without bound. Raises as `read`."""
    load, data = _loader(asked.called), asked.data
    with _answered(asked.called):
        stream = iter(load(data.name, data.config, split=asked.split, streaming=True, revision=data.revision))
    while True:
        with _answered(asked.called):
            row = next(stream, None)
        if row is None:
            return
        yield row


def _documents(rows: list[str], joint: bool) -> tuple[str, ...]:
    return tuple(text for text in (["\n\n".join(rows)] if joint else rows) if text.strip())


def _texts(asked: Asked) -> Iterator[str]:
    fields = asked.data.fields
    for row in rows(asked):
        fields = fields or _text_fields(row, asked.called)
        lacking = [name for name in fields if not isinstance(row.get(name), str)]
        if lacking:
            raise InputError(
                f"{asked.called}: rows hold no text in {lacking[0]!r}, their columns are {', '.join(row)}; {LOCAL}"
            )
        yield "\n".join(value for name in fields if (value := row[name]) or len(fields) == 1)


def _text_fields(row: dict[str, Any], called: str) -> tuple[str, ...]:
    strings = [name for name, value in row.items() if isinstance(value, str)]
    if "text" in strings:
        return ("text",)
    if len(strings) != 1:
        raise InputError(
            f"{called}: none of its columns {', '.join(row)} is 'text' or the only one of strings; {LOCAL}"
        )
    return (strings[0],)


def _loader(called: str) -> Callable[..., Any]:
    """Return `datasets.load_dataset`. Raises UnsupportedError where the library is missing or runs scripts."""
    try:
        datasets: Any = importlib.import_module("datasets")
    except ImportError:
        raise UnsupportedError(
            f"{called}: reading it from the hub needs the package datasets (pip install 'shortllama[eval]'); or {LOCAL}"
        ) from None
    if int(datasets.__version__.split(".")[0]) < _OLDEST:
        raise UnsupportedError(
            f"{called}: datasets {datasets.__version__} may run the scripts of data sets; install version "
            f"{_OLDEST} or later, or {LOCAL}"
        )
    return datasets.load_dataset


@contextmanager
def _answered(called: str) -> Generator[None]:
    """Turn what the library raises into one line, and keep its retries to itself.

    Its errors have no common base: those of HTTP, of files, of tables and its own all come through here.
    """
    loggers = [logging.getLogger(name) for name in ("huggingface_hub", "datasets", "fsspec")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    except Exception as error:
        said = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"{called}: {said.rstrip('.')}; {LOCAL}") from error
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
