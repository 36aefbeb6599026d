"""The zero-shot tasks as rows of data: the paper's seven with the metric that it reports for each, LAMBADA, and two
that are made of the dense model's own text (`cloze`).

Local files are read here too, into the same items that the harness's own tasks make of the data sets on the hub, prompt
for prompt; where a file has lost something, its row says so. No torch, no harness.
"""

from __future__ import annotations

import bz2
import difflib
import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import msgspec

from shortllama import files
from shortllama.errors import InputError

# Of our own definitions over local files: to be raised when a prompt or a check changes.
LOCAL_VERSION = "1"
LINES_AN_ITEM = 6


class Task(msgspec.Struct, frozen=True):
    """A task: its published number of items, how many choices an item has, and how a local file becomes prompts.

    `files`: names that are looked for, in this order. A `.jsonl` file holds one object a line, with the keys `query`,
    `choices` and `gold`, or `context_options`, `continuation` and `gold`, or `context` and `continuation`; a `.txt` one
    (also `.bz2`) six lines an item: context, index of the right ending, four endings. `drop` begins every query of the
    file and is no part of the prompt, `ending` ends the prompt. `averaged`: one of the seven that the paper averages.
    A task without files is made of text, and has no published number of items (0).
    """

    metric: str
    published: int
    choices: tuple[int, int]
    files: tuple[str, ...]
    drop: str = ""
    ending: str = ""
    averaged: bool = True
    hub: str = ""


ANSWER = "\nAnswer:"
ENDING, WORD = "self-ending", "self-word"

# Metrics: Shortened LLaMA, table 2 and its code (acc, or acc_norm: by characters). Counts: the sets that the harness
# evaluates. HellaSwag's text file keeps the second half of a context in lower case, where the harness capitalizes it.
TASKS: dict[str, Task] = {
    "boolq": Task("acc", 3270, (2, 2), ("boolq.jsonl",), drop="Passage: ", ending=ANSWER),
    "piqa": Task("acc", 1838, (2, 2), ("piqa.jsonl",), ending=ANSWER),
    "hellaswag": Task("acc_norm", 10042, (4, 4), ("hellaswag.jsonl", "hellaswag_val_full.txt.bz2", "hellaswag.txt")),
    "winogrande": Task("acc", 1267, (2, 2), ("winogrande.jsonl",)),
    "arc_easy": Task("acc", 2376, (3, 5), ("arc_easy.jsonl",), ending=ANSWER),
    "arc_challenge": Task("acc_norm", 1172, (3, 5), ("arc_challenge.jsonl",), ending=ANSWER),
    "openbookqa": Task("acc_norm", 500, (4, 4), ("openbookqa.jsonl", "openbook_qa.jsonl")),
    "lambada": Task(
        "acc", 5153, (1, 1), ("lambada.jsonl", "lambada_openai.jsonl"), averaged=False, hub="lambada_openai"
    ),
    ENDING: Task("acc", 0, (4, 4), (), averaged=False),
    WORD: Task("acc", 0, (1, 1), (), averaged=False),
}
ALL = "all"  # the seven


def guessing(name: str) -> float:
    """Return the accuracy of a guess: one of the choices, or no word at all."""
    least, most = TASKS[name].choices
    return 0.0 if most == 1 else 1 / least


class Item(msgspec.Struct, frozen=True):
    """One question: every context with every continuation is a candidate, and either is alone; `gold` is the right one.

    A continuation follows its context after one space.
    """

    contexts: tuple[str, ...]
    continuations: tuple[str, ...]
    gold: int


class Items(msgspec.Struct, frozen=True):
    """The items of a local file, its name, and a digest of the items."""

    items: tuple[Item, ...]
    origin: str
    digest: str


def lookup(names: str) -> list[str]:
    """Return the task names in a list such as `boolq,piqa`; `all` is the paper's seven.

    Raises InputError for an unknown name, with the nearest known one.
    """
    found: list[str] = []
    for name in (part.strip() for part in names.split(",")):
        if name == ALL:
            found += [one for one, task in TASKS.items() if task.averaged]
        elif name in TASKS:
            found.append(name)
        else:
            near = difflib.get_close_matches(name, TASKS, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(TASKS)}, and {ALL!r} for the seven"
            raise InputError(f"no task is called {name!r}; {hint}")
    return list(dict.fromkeys(found))


def read_all(names: Iterable[str], folder: Path) -> dict[str, Items]:
    """Return the items of those of the tasks that have files. Raises InputError as `read` does."""
    return {name: read(name, folder) for name in names if TASKS[name].files}


def read(name: str, folder: Path) -> Items:
    """Return a task's items from its file in `folder`.

    Raises InputError where the folder has none, and with the line for an item with a missing key, the wrong number of
    choices, or a right answer that is none of them.
    """
    task = TASKS[name]
    path = next((folder / file for file in task.files if (folder / file).is_file()), None)
    if path is None:
        reason = "is no folder" if not folder.is_dir() else f"holds no {' or '.join(task.files)}"
        raise InputError(f"task {name!r}: {folder} {reason}; put the file there, or leave --task-data out for the hub")
    data = files.read_bytes(path)
    if path.suffix == ".bz2":
        try:
            data = bz2.decompress(data)
        except (OSError, ValueError) as error:
            raise InputError(f"{path}: is not a whole bz2 file ({error})") from None
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text (byte {error.start})") from None
    records = _objects(text, path) if path.suffix == ".jsonl" else _blocks(text, path)
    items = tuple(_item(name, record, where) for where, record in records)
    if not items:
        raise InputError(f"{path}: holds no items")
    return Items(items, path.name, hashlib.sha256(msgspec.json.encode(items)).hexdigest()[:16])


def _objects(text: str, path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except json.JSONDecodeError as error:
            raise InputError(f"{path}:{number}: not JSON ({error.msg}); expected one item a line") from None
        if not isinstance(value, dict):
            raise InputError(f"{path}:{number}: saw {str(value)[:40]!r}; expected an object with query, choices, gold")
        yield f"{path}:{number}", value


def _blocks(text: str, path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    lines = text.rstrip("\n").split("\n")
    for start in range(0, len(lines), LINES_AN_ITEM):
        context, gold, *choices = [*lines[start : start + LINES_AN_ITEM], ""][:LINES_AN_ITEM]
        where = f"{path}:{start + 1}"
        if not gold.isdecimal() or len(lines) < start + LINES_AN_ITEM:
            raise InputError(
                f"{where}: saw {gold[:40]!r} after the context; expected {LINES_AN_ITEM} lines an item: context, index "
                "of the right ending, four endings"
            )
        yield where, {"query": context, "choices": choices, "gold": int(gold)}


def _item(name: str, record: dict[str, Any], where: str) -> Item:
    """Return the item of one record. Raises InputError where it is not one of this task."""
    task = TASKS[name]
    if task.choices == (1, 1):
        context, continuation = _texts(record, ("context", "continuation"), where)
        return Item((context,), (continuation,), 0)
    several = "context_options" if "context_options" in record else "choices"
    (one,) = _texts(record, ("continuation" if several == "context_options" else "query",), where)
    options = record.get(several)
    if not isinstance(options, list) or not all(isinstance(option, str) and option for option in options):
        raise InputError(f"{where}: saw {str(options)[:40]!r} as {several!r}; expected a list of texts")
    least, most = task.choices
    if not least <= len(options) <= most:
        allowed = str(least) if least == most else f"{least} to {most}"
        raise InputError(f"{where}: {len(options)} choices; an item of {name} has {allowed}")
    gold = record.get("gold")
    if type(gold) is not int or not 0 <= gold < len(options):
        raise InputError(f"{where}: gold is {gold!r}; expected the index of one of the {len(options)} choices, from 0")
    if several == "context_options":
        return Item(tuple(options), (one,), gold)
    prompt = one.removeprefix(task.drop)
    return Item((prompt.rstrip("\n") + task.ending if task.ending else prompt,), tuple(options), gold)


def _texts(record: dict[str, Any], keys: Iterable[str], where: str) -> list[str]:
    found: list[str] = []
    for key in keys:
        value = record.get(key)
        if not isinstance(value, str) or not value:
            seen = f"saw {str(value)[:40]!r}" if key in record else f"keys are {', '.join(sorted(record)[:6])}"
            raise InputError(f"{where}: no text in {key!r} ({seen})")
        found.append(value)
    return found
