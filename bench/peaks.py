"""What this machine was measured to be able to do: its figures, where they are kept, and what runs carry of them. Pure.

`shortllama ceilings` measures them; the document is kept in the user's state by the id of the environment, and its
`Peaks` are copied into the facts of every run's environment, so that rows can be judged wherever they are read. A
fingerprint changes with the libraries; ceilings measured before are then unknown.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, TypeAlias

import msgspec

from bench import noise
from bench.devices import Device
from bench.measurement import Environment
from bench.timing import Estimate
from shortllama import files
from shortllama.errors import InputError

FACT = "ceilings"  # in an environment's facts

# read, copy: memory; cache-read, cache-copy: the last-level cache; matrix: a product of square matrices; gemv-out and
# gemv-in: one token times a matrix whose outputs or inputs have the width in question; launch: a kernel of one value.
Kind: TypeAlias = Literal["read", "copy", "cache-read", "cache-copy", "matrix", "gemv-out", "gemv-in", "launch"]


class Probe(msgspec.Struct, frozen=True):
    """One thing to measure. `way`: a dtype, or for launches eager or graph.

    `size`: bytes of a tensor (read, copy), the side of a matrix, or a width. `work`: what one call does: bytes moved
    (a copy counts twice its tensor), FLOPs, or 1 launch.
    """

    kind: Kind
    way: str
    size: int
    work: int


class Figure(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a probe came to: bytes/s, FLOP/s, or for a launch seconds. The median, its 95 % interval (null with fewer
    than 6 samples), and the number of samples."""

    kind: Kind
    way: str
    size: int
    value: float
    low: float | None
    high: float | None
    count: int


class Ceilings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The document of `shortllama ceilings`. `cache_bytes`: the last-level cache that the threads reach; `reasons`: why
    something could not be measured, by kind or `kind way`; `wall_s`: what measuring took.

    Schema history: shortllama.ceilings/1: first.
    """

    environment: Environment
    cache_bytes: int | None
    figures: tuple[Figure, ...]
    reasons: dict[str, str]
    wall_s: float
    schema: Literal["shortllama.ceilings/1"] = "shortllama.ceilings/1"

    def best(self, kind: Kind, way: str | None = None) -> Figure | None:
        """Return the highest rate of a kind (the shortest time of launches); None where none was measured."""
        found = [one for one in self.figures if one.kind == kind and way in (None, one.way)]
        sign = -1 if kind == "launch" else 1
        return max(found, key=lambda one: sign * one.value, default=None)


class Peaks(msgspec.Struct, frozen=True):
    """The ceilings that rows are judged against: bytes/s, FLOP/s by dtype, seconds a launch by way."""

    read: float
    copy: float
    flops: dict[str, float]
    launch_s: dict[str, float]
    cache_bytes: int | None = None
    cache_read: float | None = None
    date: str = ""

    def device(self, known: Device) -> Device:
        """Return `known` with these for its figures: a roof, whatever the table knows of it."""
        return msgspec.structs.replace(
            known,
            bandwidth=self.read,
            flops=self.flops,
            nominal=False,
            cache_bytes=self.cache_bytes if self.cache_read and self.cache_bytes else 0,
            cache_bandwidth=self.cache_read or 0.0,
        )


def peaks(measured: Ceilings) -> Peaks:
    """Return the peaks in a document: the largest sustained rates over sizes, four digits.

    Reading counts by whichever way was fastest, products with one vector included: that is what decoding does.
    """
    read = max(_value(measured.best(kind)) or 0.0 for kind in ("read", "gemv-out", "gemv-in"))
    ways = {
        kind: dict.fromkeys(one.way for one in measured.figures if one.kind == kind) for kind in ("matrix", "launch")
    }
    return Peaks(
        read=_rounded(read),
        copy=_rounded(_value(measured.best("copy")) or 0.0),
        flops={way: _rounded(_value(measured.best("matrix", way)) or 0.0) for way in ways["matrix"]},
        launch_s={way: _rounded(_value(measured.best("launch", way)) or 0.0) for way in ways["launch"]},
        cache_bytes=measured.cache_bytes,
        cache_read=None
        if measured.best("cache-read") is None
        else _rounded(_value(measured.best("cache-read")) or 0.0),
        date=str(measured.environment.facts.get("date", ""))[:10],
    )


def _value(figure: Figure | None) -> float | None:
    return None if figure is None else figure.value


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")


# -- what to measure --------------------------------------------------------------------------------------------------

DTYPES = ("float32", "bfloat16", "float16", "float64")
CPU_SIDES, CUDA_SIDES = (512, 1024, 2048), (2048, 4096, 8192)
# About 4096, a common hidden size: odd, and divisible by 2, 8, 32, 64 and 4096; then two widths of pruned FFNs.
WIDTHS = (4095, 4096, 4097, 4098, 4104, 4128, 4160, 8256, 10368)
HIDDEN = 4096
BEYOND_CACHE = 4  # a tensor of this many caches is no longer served by it
WITHOUT_CACHE = 64 << 20  # taken for the cache where its size is not known
_ITEM = {"float32": 4, "float16": 2}


def probes(kind: str, cache_bytes: int | None, free_bytes: int) -> tuple[Probe, ...]:
    """Return what to measure on a device of `kind` (cpu, cuda) with that cache and that much memory free.

    Sizes ascend: where a product of matrices takes too long, larger ones need not be tried. Tensors take at most a
    quarter of what is free (matrices for one vector half); where that is no more than the cache, memory is left out.
    """
    cache = cache_bytes or WITHOUT_CACHE
    room = free_bytes // 4
    beyond = [size for size in (BEYOND_CACHE * cache, 4 * BEYOND_CACHE * cache) if 2 * size <= room]
    if not beyond and room // 2 > 2 * cache:
        beyond = [_whole(room // 2)]
    inside = [_whole(cache // 8), _whole(cache // 4), _whole(cache // 2)] if cache_bytes else []
    found = [Probe("read", way, size, size) for way in ("float32", "int64") for size in beyond]
    found += [Probe("copy", "float32", size, 2 * size) for size in beyond]
    found += [Probe("cache-read", way, size, size) for way in ("float32", "int64") for size in inside]
    found += [Probe("cache-copy", "float32", size // 2, size) for size in inside]
    sides = CPU_SIDES if kind == "cpu" else CUDA_SIDES
    found += [Probe("matrix", dtype, side, 2 * side**3) for dtype in DTYPES for side in sides]
    if beyond:
        dtype = "float32" if kind == "cpu" else "float16"
        found += [Probe("gemv-out", dtype, width, width * HIDDEN * _ITEM[dtype]) for width in WIDTHS]
        found += [Probe("gemv-in", dtype, width, width * HIDDEN * _ITEM[dtype]) for width in WIDTHS]
    ways = ("eager",) if kind == "cpu" else ("eager", "graph")
    return (*found, *(Probe("launch", way, 1, 1) for way in ways))


def _whole(size: int) -> int:
    """A size that tensors of every dtype can have."""
    return max(size // 4096, 1) * 4096


def copies(probe: Probe, cache_bytes: int | None) -> int:
    """Return how many matrices a product with one vector must take in turn, so that none is still in the cache."""
    return math.ceil(BEYOND_CACHE * (cache_bytes or WITHOUT_CACHE) / probe.work)


def figure(probe: Probe, seconds: Estimate) -> Figure:
    """Return a probe's figure from the seconds of doing its work once: a rate's interval is that of time, turned."""
    if probe.kind == "launch":
        return Figure(probe.kind, probe.way, probe.size, seconds.value, seconds.low, seconds.high, seconds.count)
    low, high = (None if end is None else probe.work / end for end in (seconds.high, seconds.low))
    return Figure(probe.kind, probe.way, probe.size, probe.work / seconds.value, low, high, seconds.count)


# -- what parent and child say to each other --------------------------------------------------------------------------


class Ask(msgspec.Struct, frozen=True):
    """A child's job: where to measure, with how many threads; of a CUDA device, torch gives cache and free memory."""

    device: str
    threads: int
    cache_bytes: int | None
    free_bytes: int


class Planned(msgspec.Struct, frozen=True, tag=True):
    """What will be measured, and the last-level cache it was chosen by."""

    probes: tuple[Probe, ...]
    cache_bytes: int | None


class Answer(msgspec.Struct, frozen=True, tag=True):
    """What became of the probe of this index: its figure, or why there is none."""

    index: int
    figure: Figure | None
    reason: str = ""


class Failed(msgspec.Struct, frozen=True, tag=True):
    """Nothing more can be measured; why."""

    reason: str


Message: TypeAlias = Planned | Answer | Failed
DECODER: msgspec.json.Decoder[Message] = msgspec.json.Decoder(Message)


# -- the machine's own ------------------------------------------------------------------------------------------------


def file(environment: str) -> Path:
    """Return where the ceilings of the environment with that id are kept."""
    return noise.file().parent / "ceilings" / f"{environment}.json"


def read(path: Path) -> Ceilings:
    """Return the document in a file. Raises InputError where it is none."""
    return files.decode_json(files.read_bytes(path), Ceilings, str(path))


def remember(measured: Ceilings) -> Path:
    """Keep the ceilings for later runs in their environment; return the file."""
    path = file(measured.environment.id)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror}); set XDG_STATE_HOME") from error
    files.write_atomically(path, files.encode_json(measured))
    return path


def known(environment: str) -> Peaks | None:
    """Return the peaks kept for the environment with that id; None where none are."""
    path = file(environment)
    if not path.exists():
        return None
    try:
        return peaks(read(path))
    except InputError as error:
        raise InputError(f"{error}; delete it to go on without ceilings, or measure them again") from None


def facts(environment: str) -> dict[str, Any]:
    """Return what the kept ceilings add to an environment's facts; nothing where there are none."""
    found = known(environment)
    return {} if found is None else {FACT: msgspec.to_builtins(found)}


def of(environment: Environment) -> Peaks | None:
    """Return the peaks that a run's environment carries. Raises InputError where they cannot be read."""
    carried = environment.facts.get(FACT)
    if carried is None:
        return None
    try:
        return msgspec.convert(carried, Peaks)
    except msgspec.ValidationError as error:
        raise InputError(f"environment {environment.id}: its ceilings cannot be read: {error}") from None


def by_environment(environments: Iterable[Environment]) -> dict[str, Peaks]:
    """Return the peaks by the id of each environment that carries some."""
    return {one.id: found for one in environments if (found := of(one)) is not None}
