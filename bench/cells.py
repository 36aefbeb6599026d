"""The grid: suites, cells and groups, as values. Pure; decoding is strict and names the offending key.

A cell is one point: subject x runtime x dtype x attention x batch x prompt x output x budget. Its id is a hash of its
canonical form, so equal cells of different runs, machines and dates pair up by id.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Annotated, Literal, cast

import msgspec

from bench import runtime_rows
from shortllama import files
from shortllama.errors import InputError
from shortllama.shape import ITEM_BYTES

SUITE_SCHEMA = "shortllama.suite/1"
RUNTIMES = tuple(runtime_rows.ROWS)
ATTENTION = ("sdpa", "eager")
TIMINGS = ("careful", "paper")
LARGEST_BATCH = 1 << 20
_UNITS = {"KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}

Positive = Annotated[int, msgspec.Meta(ge=1)]


class BatchRange(msgspec.Struct, frozen=True, forbid_unknown_fields=True, rename={"start": "from"}):
    """Batches `from`, `from * factor`, ... until memory ends (or `until`, a largest batch)."""

    start: Positive = 1
    factor: Annotated[int, msgspec.Meta(ge=2)] = 2
    until: Literal["oom"] | Positive = "oom"


class Suite(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One TOML file: the axes of a sweep. `perplexity` names text sources to evaluate the real subjects on; with
    `telemetry`, each cell is called again after it was timed, for the sampler to see."""

    schema: Literal["shortllama.suite/1"]
    subjects: tuple[str, ...]
    runtimes: tuple[str, ...] = ("eager",)
    dtypes: tuple[str, ...] = ("float16",)
    attention: tuple[str, ...] = ("sdpa",)
    batch: tuple[Positive, ...] | BatchRange = (1,)
    prompt: tuple[Positive, ...] = (12,)
    output: tuple[Positive, ...] = (128,)
    budgets: tuple[str, ...] = ("none",)
    timing: str = "careful"
    cell_seconds: Annotated[float, msgspec.Meta(gt=0)] = 20.0
    seed: int = 0
    perplexity: tuple[str, ...] = ()
    telemetry: bool = False


class Cell(msgspec.Struct, frozen=True, forbid_unknown_fields=True, order=True):
    """One point of the grid. `budget` is "none" or a size such as "24GiB"; prompt and output count tokens."""

    subject: str
    runtime: str
    dtype: str
    attention: str
    prompt: int
    output: int
    budget: str
    batch: int

    @property
    def id(self) -> str:
        """16 hexadecimal digits over the canonical form."""
        return hashlib.sha256(msgspec.json.encode(self, order="sorted")).hexdigest()[:16]

    @property
    def group(self) -> Cell:
        """The same cell at batch 0: cells of one group share a child process and run batch ascending."""
        return msgspec.structs.replace(self, batch=0)

    @property
    def label(self) -> str:
        """A short name for people."""
        budget = "" if self.budget == "none" else f" budget {self.budget}"
        return f"{self.subject} {self.runtime} {self.dtype} M{self.batch} P{self.prompt} L{self.output}{budget}"


def budget_bytes(text: str) -> int | None:
    """Return the bytes of a budget such as "24GiB" or "512MiB"; None for "none". Raises InputError otherwise."""
    if text == "none":
        return None
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]iB)", text)
    if not match or float(match.group(1)) == 0:
        raise InputError(f"budget {text!r} is not a size; write for example 24GiB, 512MiB or none")
    return round(float(match.group(1)) * _UNITS[match.group(2)])


def suite_path(name: str) -> Path:
    """Return the file of a suite: a TOML file itself, or the shipped suite of that name."""
    path = Path(name)
    if path.suffix or path.exists():
        return path
    shipped = Path(__file__).parent / "suites"
    if not (shipped / f"{name}.toml").exists():
        names = ", ".join(sorted(p.stem for p in shipped.glob("*.toml")))
        raise InputError(f"suite {name!r} is neither a file nor a shipped suite; shipped: {names}")
    return shipped / f"{name}.toml"


def read_suite(name: str) -> Suite:
    """Return the suite in a TOML file, or the shipped suite of that name."""
    path = suite_path(name)
    suite = files.decode_toml(files.read_bytes(path), Suite, str(path))
    check_suite(suite, str(path))
    return suite


def check_suite(suite: Suite, where: str) -> None:
    """Raise InputError for an axis without values, an unknown name, or a size that cannot be read."""
    allowed = {"runtimes": RUNTIMES, "dtypes": tuple(ITEM_BYTES), "attention": ATTENTION, "timing": TIMINGS}
    for axis in ("subjects", "runtimes", "dtypes", "attention", "prompt", "output", "budgets", "batch"):
        values: object = getattr(suite, axis)
        if isinstance(values, tuple):
            chosen = cast("tuple[object, ...]", values)
            if not chosen:
                raise InputError(f"{where}: $.{axis} is empty, so the suite has no cells; give at least one value")
            if len(set(chosen)) != len(chosen):
                raise InputError(f"{where}: $.{axis} names a value twice")
    if not batches(suite):
        raise InputError(f"{where}: $.batch has no value: it begins above its `until`; raise that, or lower `from`")
    for axis, names in allowed.items():
        values = cast("str | tuple[str, ...]", getattr(suite, axis))
        for index, value in enumerate((values,) if isinstance(values, str) else values):
            if value not in names:
                place = f"$.{axis}" if isinstance(values, str) else f"$.{axis}[{index}]"
                raise InputError(
                    f"{where}: {place}: unknown {axis.rstrip('s')} {value!r}; choose one of {', '.join(names)}"
                )
    for index, budget in enumerate(suite.budgets):
        try:
            budget_bytes(budget)
        except InputError as error:
            raise InputError(f"{where}: $.budgets[{index}]: {error}") from None


def batches(suite: Suite) -> tuple[int, ...]:
    """Return the batch sizes in ascending order; an open range ends at LARGEST_BATCH (memory ends it earlier)."""
    if isinstance(suite.batch, tuple):
        return tuple(sorted(suite.batch))
    last = LARGEST_BATCH if suite.batch.until == "oom" else suite.batch.until
    values: list[int] = []
    value = suite.batch.start
    while value <= last:
        values.append(value)
        value *= suite.batch.factor
    return tuple(values)


def expand(suite: Suite) -> Iterator[Cell]:
    """Yield every cell of the suite, group by group: subject varies fastest between groups, batch ascends in a group.

    An open batch range yields the batches up to LARGEST_BATCH; the schedule cuts it with the memory model.
    """
    sizes = batches(suite)
    for runtime, dtype, attention, budget, prompt, output, subject in product(
        suite.runtimes, suite.dtypes, suite.attention, suite.budgets, suite.prompt, suite.output, suite.subjects
    ):
        for batch in sizes:
            yield Cell(subject, runtime, dtype, attention, prompt, output, budget, batch)
