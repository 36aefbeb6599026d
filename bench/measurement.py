"""What happened in a cell, as rows of a results file. Out of memory is an outcome, not an exception.

One JSON object a line, told apart by `kind`: environments first, then the rows that refer to them. Raw samples are
stored, statistics are computed on read. Units are in the names: `_s` seconds, `_bytes`, `_w`; shares are 0-1.

Schema history: shortllama.measurement/1: first.
"""

from __future__ import annotations

import hashlib
from typing import Any, Literal, TypeAlias

import msgspec

from bench.cells import Cell

SCHEMA = "shortllama.measurement/1"
LARGEST_LINE_BYTES = 8 << 10

Outcome: TypeAlias = Literal["ok", "oom", "oom-implied", "skipped", "failed", "timed-out", "unstable"]


class Environment(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="kind", tag="environment"):
    """The machine and software that rows refer to by `id`.

    `fingerprint` holds what must be equal for times to be compared (device, driver, library versions, threads,
    allocator settings, attention kernel, dtype support); `facts` holds the rest (clocks, load, git state, date).
    """

    id: str
    fingerprint: dict[str, Any]
    facts: dict[str, Any] = {}
    schema: Literal["shortllama.measurement/1"] = SCHEMA


def environment(fingerprint: dict[str, Any], facts: dict[str, Any]) -> Environment:
    """Return an Environment whose id is a hash of the fingerprint alone."""
    digest = hashlib.sha256(msgspec.json.encode(fingerprint, order="sorted")).hexdigest()[:16]
    return Environment(digest, fingerprint, facts)


class SessionId(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Which process session a row belongs to, and its place in a paired experiment ("" and 0 where there is none)."""

    id: str
    pair: int = 0
    order: str = ""


class Samples(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Seconds. `call_s`: one per repeat, host clock around the synchronised call; `device_s`: the same by device
    events (empty where there are none); `prefill_s`: time to the first token, one per repeat; `step_s`: one median
    over repeats per output position after the first (L - 1 values; above 256, means over runs of neighbours)."""

    call_s: tuple[float, ...] = ()
    prefill_s: tuple[float, ...] = ()
    step_s: tuple[float, ...] = ()
    device_s: tuple[float, ...] = ()


class Memory(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Bytes; null where this device or pass cannot tell, with the reason in `reasons` by field name.

    `analytic`: the model's prediction; `allocated`: peak of live tensors (on a CPU: peak resident growth over the
    baseline); `reserved`: peak of the allocator; `device_used`: whole device minus idle; `context`: fixed overhead;
    `first_call`: peak of the very first call, workspaces included.
    """

    analytic: int | None = None
    allocated: int | None = None
    reserved: int | None = None
    device_used: int | None = None
    context: int | None = None
    first_call: int | None = None
    reasons: dict[str, str] = {}


class Graphs(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a runtime compiled or captured for a cell: `made` before the first call, `again` after it (0 where the cell
    ran as it should), graph `breaks`, `seconds` it took, and the bytes of the graphs' memory pool (None: no pool)."""

    made: int
    again: int = 0
    breaks: int = 0
    seconds: float = 0.0
    pool_bytes: int | None = None


class Bounds(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The physics of one cell: what one decode step at mid-output must move and compute, and how near we came.

    `roof_s`: the least time of the whole call on the datasheet's peaks, null with the reason in `why` where they are
    unknown; `achieved`: roof over measured median (0-1); `ops_per_token`: how often one decode step calls each
    operation, by name; `kernel_s`: seconds that kernels run in the first, by the profiler (on CUDA, once a
    group, where a step is neither compiled nor captured).
    `launch_share` and `regime` are null in files: it takes the same cell in two runtimes to tell,
    so they are worked out when rows are read (`bench.regimes`).
    """

    decode_bytes: int
    decode_flops: int
    moved_bytes: int | None = None
    roof_s: float | None = None
    achieved: float | None = None
    launch_share: float | None = None
    regime: str | None = None
    why: str | None = None
    ops_per_token: dict[str, int] | None = None
    kernel_s: float | None = None


class Measurement(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="kind", tag="measurement"):
    """One cell's result. `reason` explains any outcome but ok; `witness` is the id of the smaller OOM cell that
    implies this one; `stop` says what ended the repeats: interval, flat, time, repeats; `emulated` describes an
    emulated budget. `tokens` counts new tokens per call (batch x output) and is checked against the cell."""

    cell: Cell
    cell_id: str
    environment: str
    outcome: Outcome
    simulated: bool
    session: SessionId
    schema: Literal["shortllama.measurement/1"] = SCHEMA
    timing: str = "careful"
    samples: Samples = Samples()
    warm_up: int = 0
    stop: str | None = None
    tokens: int | None = None
    memory: Memory = Memory()
    telemetry: dict[str, Any] = {}
    bounds: Bounds | None = None
    graphs: Graphs | None = None
    reason: str | None = None
    witness: str | None = None
    emulated: str | None = None
    subject_digest: str | None = None
    parameters: int | None = None
    wall_s: float | None = None


class Frontier(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="kind", tag="frontier"):
    """The largest batch of one group (`cell` has batch 0), with what was seen on both sides of it.

    `confirmed`: searched to the batch, each side tried twice in fresh processes (else the batches of a sweep's grid);
    `predicted`: by the memory model; `unsteady`: batches that fit in one trial and not in another; `peak_bytes`: at the
    largest batch; `trial_s`: seconds of all trials' work, `start_s`: of process starts and loading, not in `trial_s`.
    """

    cell: Cell
    environment: str
    largest_batch: int | None
    simulated: bool
    schema: Literal["shortllama.measurement/1"] = SCHEMA
    fits: tuple[int, ...] = ()
    fails: tuple[int, ...] = ()
    non_monotone: bool = False
    unsteady: tuple[int, ...] = ()
    trials: int = 0
    confirmed: bool = False
    predicted: int | None = None
    limit_bytes: int | None = None
    peak_bytes: int | None = None
    trial_s: float | None = None
    start_s: float | None = None
    emulated: str | None = None
    reason: str | None = None


Row: TypeAlias = Environment | Measurement | Frontier
