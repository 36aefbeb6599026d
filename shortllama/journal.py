"""What a long scoring has finished, kept beside its output, so that a run that was killed goes on where it was.

Two files. `OUT.partial.jsonl`: the key (all that decides the values), then one finished value a line, append-only; a
last line that was torn by the kill is cut. `OUT.partial.tensors`: what flows from block to block (what Taylor carries
backward, what wanda-sp feeds on), replaced as a whole: a line of JSON, then the tensors' bytes. Both go once the output
is written. It must not know criteria; a journal without a file keeps nothing, so that criteria need not ask.

Only the process's own death is guarded against: lines are handed to the system, not flushed to the disk.
Schema history: shortllama.journal/1: first.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from shortllama.costs import joined
from shortllama.errors import InputError
from shortllama.scores import Cost

if TYPE_CHECKING:
    from torch import Tensor

SCHEMA = "shortllama.journal/1"
SUFFIX = ".partial.jsonl"
_TENSORS = ".partial.tensors"

# Tensors are written when this many times as long has passed as writing them took: at most 5 % of the time goes there.
PATIENCE = 20.0
# And not before this long, so that short runs write none.
FIRST_S = 1.0


def beside(out: Path) -> Path:
    """Return where the journal of the work that ends in `out` lies."""
    return out.with_name(out.name + SUFFIX)


def discard(path: Path) -> None:
    """Remove a journal: its work is done. An absent one is fine."""
    path.unlink(missing_ok=True)
    _tensors_of(path).unlink(missing_ok=True)


def _tensors_of(path: Path) -> Path:
    return path.with_name(path.name.removesuffix(SUFFIX) + _TENSORS)


@dataclass
class _Store:
    """The files of one journal, and what they hold. `written`: when the tensors were last, and how long it took.

    `spent`: the cost of the runs before this one, up to what they finished; `meter` tells that of this run so far.
    """

    path: Path
    key: dict[str, Any]
    values: dict[str, Any] = field(default_factory=dict)
    begun: bool = False
    spent: Cost | None = None
    meter: Callable[[], Cost] | None = None
    written: tuple[float, float] = field(default_factory=lambda: (time.monotonic(), FIRST_S / PATIENCE))

    @property
    def digest(self) -> str:
        return hashlib.sha256(_line(self.key)).hexdigest()[:16]


@dataclass(frozen=True)
class Journal:
    """A journal, or the part of one under a prefix. `Journal()` keeps nothing and has finished nothing."""

    store: _Store | None = None
    prefix: str = ""

    def part(self, name: object) -> Journal:
        """Return the part of this journal under `name`, for one step or criterion of several."""
        return replace(self, prefix=f"{self.prefix}{name}/")

    def finished(self, name: object) -> Any:
        """Return the value kept under `name`, None where there is none."""
        return None if self.store is None else self.store.values.get(f"{self.prefix}{name}")

    def keep(self, name: object, value: Any) -> None:
        """Append a finished value: JSON, floats exact. One that is not finite is left out, as scores of it are refused.

        Raises InputError where the file cannot be written.
        """
        if self.store is None:
            return
        try:
            line = _line({"name": f"{self.prefix}{name}", "value": value, "cost": msgspec.to_builtins(self._cost())})
        except ValueError:
            return
        head = b"" if self.store.begun else _line({"schema": SCHEMA, "key": self.store.key})
        try:
            self.store.path.parent.mkdir(exist_ok=True)
            with self.store.path.open("ab" if self.store.begun else "wb") as file:
                file.write(head + line)
        except OSError as error:
            raise InputError(f"{self.store.path}: cannot be written ({error.strerror})") from error
        self.store.begun = True
        self.store.values[f"{self.prefix}{name}"] = value

    def metered(self, meter: Callable[[], Cost]) -> Callable[[], Cost]:
        """Let every line hold the cost so far, and return a function that returns it: runs before this one included."""
        if self.store is None:
            return meter
        self.store.meter = meter
        return lambda: joined(self.store.spent if self.store else None, meter())

    def _cost(self) -> Cost | None:
        assert self.store is not None
        return None if self.store.meter is None else joined(self.store.spent, self.store.meter())

    def carry(self, mark: int, make: Callable[[], Iterable[Tensor]]) -> None:
        """Keep the tensors that `make` yields in place of those before, under a number, unless it is too early again.

        One tensor at a time is in memory. Values of what came before them must be kept first.
        """
        if self.store is None or not self.store.begun:
            return
        last, took = self.store.written
        start = time.monotonic()
        if start - last < PATIENCE * took:
            return
        _write_tensors(self.store, self.prefix, mark, make())
        end = time.monotonic()
        self.store.written = end, end - start

    def carried(self) -> tuple[int, Iterator[Tensor]] | None:
        """Return the number and the tensors (on the CPU) that were carried last in this part, None without any."""
        return None if self.store is None or not self.store.begun else _read_tensors(self.store, self.prefix)


def resume(path: Path, key: Mapping[str, Any], note: Callable[[str], None]) -> Journal:
    """Return the journal at `path`, going on with it where its key equals `key`; `note` is told what was found.

    The file itself appears with the first value. Raises InputError for a file that is none of ours.
    """
    store = _Store(path, json.loads(_line(dict(key))))
    found = _read(path)
    if found is None:
        return Journal(store)
    old, values, spent, size = found
    differing = [name for name in {**store.key, **old} if old.get(name) != store.key.get(name)]
    if differing:
        note(f"{path} is of another run ({', '.join(differing)}): starting anew")
        discard(path)
        return Journal(store)
    os.truncate(path, size)
    store.values, store.begun, store.spent = values, True, spent
    note(f"going on after {len(values)} finished parts in {path}")
    return Journal(store)


def _line(value: Any) -> bytes:
    return json.dumps(value, allow_nan=False, sort_keys=True, separators=(",", ":")).encode() + b"\n"


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Any], Cost | None, int] | None:
    """Return key, values, cost and the size up to the last whole line; None for no file, or one torn in its head."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error
    whole = data[: data.rfind(b"\n") + 1]
    if not whole:
        return None
    try:
        head, *rest = map(json.loads, whole.splitlines())
        if head["schema"] != SCHEMA:
            raise ValueError(head["schema"])
        spent = msgspec.convert(rest[-1]["cost"], Cost | None) if rest else None
        return head["key"], {one["name"]: one["value"] for one in rest}, spent, len(whole)
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{path}: is not a journal of finished parts ({SCHEMA}); move it away, or give another --out"
        ) from error


def _write_tensors(store: _Store, prefix: str, mark: int, tensors: Iterable[Tensor]) -> None:
    path = _tensors_of(store.path)
    temporary = path.with_name(f".{path.name}.tmp")
    about = {"key": store.digest, "part": prefix, "mark": mark}
    try:
        with temporary.open("wb") as file:
            file.write(_line(about))
            for tensor in tensors:
                file.write(_line({"dtype": str(tensor.dtype).removeprefix("torch."), "shape": list(tensor.shape)}))
                file.write(_bytes(tensor.detach().cpu().contiguous()))
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise InputError(f"{path}: cannot be written ({error.strerror})") from error


def _read_tensors(store: _Store, prefix: str) -> tuple[int, Iterator[Tensor]] | None:
    """Return the mark and the tensors, which are read as they are taken; None where there are none of this part."""
    path = _tensors_of(store.path)
    try:
        with path.open("rb") as file:
            about = json.loads(file.readline())
            start = file.tell()
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read; remove it with {store.path} to start anew") from error
    if (about["key"], about["part"]) != (store.digest, prefix):
        return None
    return about["mark"], _tensors(path, start)


def _tensors(path: Path, start: int) -> Iterator[Tensor]:
    import torch

    with path.open("rb") as file:
        file.seek(start)
        while line := file.readline():
            about = json.loads(line)
            tensor = torch.empty(about["shape"], dtype=getattr(torch, about["dtype"]))
            file.readinto(_bytes(tensor))
            yield tensor


def _bytes(tensor: Tensor) -> memoryview:
    """Return the memory of a contiguous tensor on the CPU."""
    import torch

    return tensor.view(-1).view(torch.uint8).numpy().data.cast("B")
