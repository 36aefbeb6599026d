"""A measuring child: loads one subject in one runtime, runs its cells with batch ascending, reports each.

It decides nothing about outcomes beyond "this allocation failed"; the parent classifies the rest. Imports torch only
inside: the parent imports this module too.
"""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import msgspec

from bench import outcomes, passes, runtimes, timing
from bench.jobs import Began, Broke, Finished, Job, Loaded, Looped, Looping, Message, Send
from bench.measurement import Memory
from bench.runtimes.protocol import Options, OutOfMemory
from bench.telemetry import loop

if TYPE_CHECKING:
    from bench.runtimes.roofline import RooflineSession


def run(job: bytes, send_bytes: Callable[[bytes], None]) -> None:
    """Entry of a child: decode the job, run its pass, send messages."""

    def send(message: Message) -> None:
        send_bytes(msgspec.json.encode(message))

    work = msgspec.json.decode(job, type=Job)
    place = [-1]
    start = time.perf_counter()
    try:
        _run(work, send, place)
    except OutOfMemory as error:
        send(Broke(place[0], str(error), True, time.perf_counter() - start))
    except Exception as error:  # a crash of one cell is a result; the parent decides what it means
        text = f"{type(error).__name__}: {error}"
        send(Broke(place[0], outcomes.one_line(text), False, time.perf_counter() - start))


def _run(job: Job, send: Send, place: list[int]) -> None:
    start = time.perf_counter()
    simulated = job.runtime in runtimes.SIMULATED
    if simulated:
        session = _open_simulated(job)
        measure = _simulate
    else:
        _set_threads(job.options)
        measure = passes.open_pass(job)
        session = runtimes.load(job.runtime).open_session(job.subject, job.options)
        gc.collect()
        gc.freeze()  # the model's objects are for ever: collections in timed regions need not visit them
    send(Loaded(time.perf_counter() - start, None if simulated else _device_uuid(job.options.device)))
    for index, cell in enumerate(job.cells):
        place[0] = index
        send(Began(index))
        start = time.perf_counter()
        session.prepare(cell.batch, cell.prompt, cell.output)
        result = measure(job, session)
        send(msgspec.structs.replace(result, index=index, wall_s=time.perf_counter() - start))
        if job.window_s:
            began = partial(send, Looping(index))
            send(Looped(index, loop.run(session, cell, job.window_s, began)))
    session.close()


def _device_uuid(device: str) -> str | None:
    """What CUDA's device is called everywhere; its index is only CUDA's own."""
    import torch

    return None if device == "cpu" else f"GPU-{torch.cuda.get_device_properties(device).uuid}"


def _set_threads(options: Options) -> None:
    import torch

    torch.set_num_threads(options.threads)


# -- simulation -------------------------------------------------------------------------------------------------------


def _open_simulated(job: Job) -> RooflineSession:
    from bench.runtimes import roofline

    if job.script is not None:
        os.environ[roofline.SCRIPT_VARIABLE] = job.script
    return roofline.open_session(job.subject, job.options)


def _simulate(job: Job, session: Any) -> Finished:
    absent: dict[str, str] = dict.fromkeys(("reserved", "device_used", "context", "first_call"), "simulated")
    memory = Memory(allocated=session.peak_bytes(), reasons=absent)
    if job.purpose != "measure":
        session.probe()
        return Finished(0, 0.0, memory=memory)
    done = timing.measure(session.call, session.clock, timing.rule(job.timing, job.cell_seconds))
    return Finished(0, 0.0, done.samples, done.warm_up, done.stop, done.tokens, memory)
