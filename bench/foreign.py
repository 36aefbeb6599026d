"""Results of pytest-benchmark as results of ours: one JSON file is one session, each benchmark a cell of its own.

What `--benchmark-json`, `--benchmark-save` and `--benchmark-autosave` write. Only times are taken: what a project keeps
in `extra_info` has no unit that could be known here. Samples are used where the file holds them, else its median.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from bench.cells import Cell
from bench.measurement import Environment, Measurement, Samples, SessionId, environment
from bench.store import Results
from shortllama import files
from shortllama.errors import InputError

RUNTIME = "pytest-benchmark"


class _Stats(msgspec.Struct, frozen=True):
    """Seconds an iteration; `data` holds one value a round, unless it was left out on saving."""

    median: float
    data: tuple[float, ...] = ()


class _Benchmark(msgspec.Struct, frozen=True):
    fullname: str
    stats: _Stats


class _Document(msgspec.Struct, frozen=True):
    """The fields of pytest-benchmark's document that are used here; it has many others."""

    machine_info: dict[str, Any]
    benchmarks: tuple[_Benchmark, ...]
    datetime: str = ""
    commit_info: dict[str, Any] = {}
    version: str = ""


def is_foreign(path: Path) -> bool:
    """Return whether a path names a document of pytest-benchmark: those end in .json, runs of ours are folders or
    end in .jsonl."""
    return path.suffix == ".json" and not path.is_dir()


def read(path: Path) -> Results:
    """Return the session in a file. Raises InputError for one that pytest-benchmark did not write, or without a
    benchmark."""
    try:
        document = files.decode_json(files.read_bytes(path), _Document, str(path))
    except InputError as error:
        raise InputError(
            f"{error} (a .json file is read as pytest-benchmark's, see --benchmark-json; a run of ours is a folder)"
        ) from None
    if not document.benchmarks:
        raise InputError(f"{path}: holds no benchmark; run pytest --benchmark-only --benchmark-json {path.name}")
    where = _environment(document)
    session = SessionId(document.datetime or path.name)
    rows = tuple(_row(one, where, session) for one in document.benchmarks)
    return Results(path, {where.id: where}, rows, ())


def _row(one: _Benchmark, where: Environment, session: SessionId) -> Measurement:
    cell = Cell(one.fullname, RUNTIME, "", "", 0, 0, "none", 0)
    samples = Samples(call_s=one.stats.data or (one.stats.median,))
    return Measurement(cell, cell.id, where.id, "ok", False, session, samples=samples)


def _environment(document: _Document) -> Environment:
    """The machine as pytest-benchmark describes it. The host's name and the clock of the moment are no part of what
    must be equal."""
    info = document.machine_info
    cpu = info.get("cpu")
    cpu = cpu if isinstance(cpu, dict) else {}
    fingerprint = {
        "harness": RUNTIME,
        "device": cpu.get("brand_raw") or info.get("processor"),
        "cores": cpu.get("count"),
        "machine": info.get("machine"),
        "system": info.get("system"),
        "implementation": info.get("python_implementation"),
        "python": ".".join(str(info.get("python_version", "")).split(".")[:2]),
    }
    facts = {"date": document.datetime, "commit": document.commit_info.get("id"), "harness_version": document.version}
    return environment(fingerprint, facts)
