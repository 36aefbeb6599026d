"""The file `study.jsonl`: one finished run a line, append-only, on disk before the next one begins.

A last line that a kill tore is cut by the next writer; any other line that is no row is an error.
Schema history: shortllama.study-row/1: first.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, Literal

import msgspec

from shortllama import files
from shortllama.errors import InputError
from shortllama.evaluation.results import Quality
from shortllama.plans import Achieved
from shortllama.scores import Cost
from shortllama.study import Calibration

FILE = "study.jsonl"


class Row(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A finished run. `before`: the pruned model; `after`: what retraining made of it, null without.

    `pruned` is the folder in `pruned/` with its scores. `costs`: of `scoring`, of retraining `between` steps and of
    `retraining`, each summed over its parts (the peak is the highest).
    """

    id: str
    pruned: str
    subject: str
    model: str
    method: str
    label: str
    unit: str
    iterative: bool
    steps: int | None
    ratio: float
    achieved: Achieved
    parameters: int
    calibration: Calibration | None
    recipe: str
    seed: int | None
    before: Quality
    after: Quality | None
    costs: dict[str, Cost]
    schema: Literal["shortllama.study-row/1"] = "shortllama.study-row/1"

    @property
    def result(self) -> Quality:
        """What came out of the run."""
        return self.before if self.after is None else self.after


def read(folder: Path) -> tuple[Row, ...]:
    """Return the finished runs of a study's folder; a torn last line is none. Raises InputError with the line."""
    file = folder / FILE
    if not file.exists():
        return ()
    lines = files.read_bytes(file).split(b"\n")
    return tuple(files.decode_json(line, Row, f"{file}: line {number}") for number, line in enumerate(lines[:-1], 1))


@contextmanager
def writer(folder: Path) -> Generator[BinaryIO]:
    """Yield the file to append to, its torn last line cut. Raises InputError where another process holds it."""
    path = folder / FILE
    with path.open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise InputError(f"{path}: another process runs this study; wait for it, or give another --out") from None
        whole = path.read_bytes()
        file.truncate(whole.rfind(b"\n") + 1)
        yield file


def append(file: BinaryIO, row: Row) -> None:
    """Write a row and wait until it is on the disk."""
    file.write(msgspec.json.encode(row) + b"\n")
    file.flush()
    os.fsync(file.fileno())


def total(costs: Sequence[Cost]) -> Cost | None:
    """Return the sum of costs, with their highest peak; None of none."""
    if not costs:
        return None
    peaks = [one.peak_bytes for one in costs]
    known = [one for one in peaks if one is not None]
    return Cost(
        round(sum(one.wall_s for one in costs), 6),
        max(known) if len(known) == len(peaks) else None,
        sum(one.tokens for one in costs),
        runs=max(one.runs for one in costs),
        reasons={name: why for one in costs for name, why in one.reasons.items()},
    )
