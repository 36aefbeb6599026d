"""Instruction data from local files: pairs of a prompt and its response, in the form of Alpaca. No tokenizer, no torch.

A JSON file holds one list of objects, a JSONL file one object a line, with the fields "instruction", "output" and,
where there is more, "input"; or "prompt" and "response", which are taken as they are. Every error names its line.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from shortllama import files, hub, texts
from shortllama.errors import InputError

SUFFIXES = (".json", ".jsonl")

# The wording that Alpaca's instructions were collected for and models are trained with; a fact, not a choice.
_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
_WITHOUT_INPUT = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)


class Instruction(msgspec.Struct, frozen=True):
    """What a model is asked, complete with its wording, and what it should answer."""

    prompt: str
    response: str


def holds(path: Path) -> bool:
    """Whether a file holds instructions rather than text: any .json, and .jsonl whose first object looks like one."""
    if path.suffix != ".jsonl":
        return path.suffix == ".json"
    first = next(texts.json_lines(_text(path).lstrip().partition("\n")[0], path), (0, None))[1]
    return isinstance(first, dict) and "text" not in first and bool({"instruction", "prompt", "output"} & first.keys())


def read(path: Path) -> tuple[Instruction, ...]:
    """Return a file's instructions in order. Raises InputError with the line of the first that is not one."""
    text = _text(path)
    items = _json_items(text, path) if path.suffix == ".json" else texts.json_lines(text, path)
    found = tuple(_instruction(value, path, line) for line, value in items)
    if not found:
        raise InputError(f'{path}: holds no instructions; expected objects with "instruction" and "output"')
    return found


def from_hub(asked: hub.Asked) -> tuple[Instruction, ...] | None:
    """Return the instructions of a data set on the hub; None where its rows hold none. Raises as `hub.read`."""
    found: list[Instruction] = []
    for number, row in enumerate(hub.rows(asked), start=1):
        if not found and not {"instruction", "output"} <= row.keys():
            return None
        found.append(_instruction(row, asked.name, number))
    return tuple(found)


def prompt_of(instruction: str, context: str = "") -> str:
    """Return Alpaca's prompt for an instruction, with or without more context."""
    template = _WITH_INPUT if context else _WITHOUT_INPUT
    return template.format(instruction=instruction, input=context)


def _text(path: Path) -> str:
    try:
        return files.read_bytes(path).decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text (byte {error.start}); give a JSON or JSONL file") from None


def _json_items(text: str, path: Path) -> Iterator[tuple[int, Any]]:
    """Yield (line number from 1, value) of each item of a JSON list."""
    decoder, at, counted, line = json.JSONDecoder(), _skip(text, 0), 0, 1
    if text[at : at + 1] != "[":
        raise InputError(f"{path}:1: saw {text[at : at + 20]!r}; expected a JSON list of objects, or name it .jsonl")
    at = _skip(text, at + 1)
    while text[at : at + 1] != "]":
        line, counted = line + text.count("\n", counted, at), at
        try:
            value, at = decoder.raw_decode(text, at)
        except json.JSONDecodeError as error:
            raise InputError(f"{path}:{error.lineno}: not JSON ({error.msg}); was the file cut off?") from None
        yield line, value
        at = _skip(text, at)
        if text[at : at + 1] == ",":
            at = _skip(text, at + 1)
        elif text[at : at + 1] != "]":
            raise InputError(f"{path}:{text.count(chr(10), 0, at) + 1}: the list is not closed; was the file cut off?")


def _skip(text: str, at: int) -> int:
    while at < len(text) and text[at] in " \t\r\n":
        at += 1
    return at


def _instruction(value: Any, path: Path | str, line: int) -> Instruction:
    if isinstance(value, dict):
        fields = {name: value.get(name) for name in ("instruction", "output", "prompt", "response")}
        context = value.get("input") or ""
        if isinstance(fields["instruction"], str) and isinstance(fields["output"], str) and isinstance(context, str):
            return Instruction(prompt_of(fields["instruction"], context), fields["output"])
        if isinstance(fields["prompt"], str) and isinstance(fields["response"], str):
            return Instruction(fields["prompt"], fields["response"])
        seen = f"keys {', '.join(sorted(value)[:6]) or 'none'}"
    else:
        seen = repr(value)[:40]
    raise InputError(f'{path}:{line}: saw {seen}; expected "instruction" and "output" as text (and perhaps "input")')
