"""What parent and child say to each other: a job, and messages about its cells. Values only, JSON on the wire."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, TypeAlias

import msgspec

from bench.cells import Cell
from bench.measurement import Graphs, Memory, Samples
from bench.runtimes.protocol import Options, Session
from bench.subjects import Subject
from bench.telemetry.readings import Loop

# What a child does with each cell: `measure` its times, `probe` its peak memory (`certify`: by a whole generation), or
# `profile` a few of its steps.
Purpose: TypeAlias = Literal["measure", "probe", "certify", "profile"]


class Job(msgspec.Struct, frozen=True):
    """The cells of one group (or what is left of it) for one child.

    `timing`, `cell_seconds`: the rule to measure by; `limit_bytes`: what the process may allocate from now on (probes);
    budgets of other devices are in `options`; `script`: faults of a simulated device, JSON; `folder`: where a profile
    is written; `window_s`: how long each measured cell is called again for the sampler, 0 for not at all.
    """

    subject: Subject
    runtime: str
    options: Options
    cells: tuple[Cell, ...]
    purpose: Purpose = "measure"
    timing: str = "careful"
    cell_seconds: float = 0.0
    limit_bytes: int | None = None
    script: str | None = None
    folder: str | None = None
    window_s: float = 0.0


class Profile(msgspec.Struct, frozen=True):
    """Where a cell's time went: its trace, seconds of the profiled work by the wall and (CUDA) of kernels, and the
    operations that took longest themselves: name, calls, seconds."""

    path: str
    wall_s: float
    kernel_s: float | None
    longest: tuple[tuple[str, int, float], ...]


class Loaded(msgspec.Struct, frozen=True, tag=True):
    """The subject is there; seconds it took, and the UUID of the CUDA device that it is on."""

    wall_s: float
    uuid: str | None = None


class Began(msgspec.Struct, frozen=True, tag=True):
    """Work on the job's cell of this index has begun."""

    index: int


class Finished(msgspec.Struct, frozen=True, tag=True):
    """The cell was measured (`measure`), or fits (a probe: no samples)."""

    index: int
    wall_s: float
    samples: Samples = Samples()
    warm_up: int = 0
    stop: str | None = None
    tokens: int | None = None
    memory: Memory = Memory()
    graphs: Graphs | None = None
    operations: dict[str, int] | None = None
    kernel_s: float | None = None
    profile: Profile | None = None


class Looping(msgspec.Struct, frozen=True, tag=True):
    """The cell was finished, and is called again from now on for the sampler to see."""

    index: int


class Looped(msgspec.Struct, frozen=True, tag=True):
    """The cell was called so often for the sampler."""

    index: int
    loop: Loop


class Broke(msgspec.Struct, frozen=True, tag=True):
    """The cell, or loading (index -1), ended in an exception; `oom` where an allocation failed. The child ends."""

    index: int
    text: str
    oom: bool
    wall_s: float


Message: TypeAlias = Loaded | Began | Finished | Looping | Looped | Broke
DECODER: msgspec.json.Decoder[Message] = msgspec.json.Decoder(Message)
Send = Callable[[Message], None]
# What a pass does with a session whose cell is prepared.
Measure = Callable[[Job, Session], Finished]
