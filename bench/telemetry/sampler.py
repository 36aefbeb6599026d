"""The process that reads while a cell runs: one a sweep, told by its parent where windows begin and end.

It reads at 10 Hz inside a window, sleeps outside of one, and ends with its parent: the pipe between them closes. It is
a process of its own and not a thread, so that it takes no interpreter's time from what is measured; it is not forked,
so that it opens NVML anew. Run as `python -m bench.telemetry.sampler FD`.
"""

from __future__ import annotations

import random
import signal
import sys
import time
from collections.abc import Generator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from types import ModuleType
from typing import TypeAlias

import msgspec

from bench import nvml
from bench.telemetry import window
from bench.telemetry.device import Devices
from bench.telemetry.host import Host
from bench.telemetry.readings import PERIOD_S, Loop, Reading, Window
from shortllama.errors import InputError

# Every so many readings, what costs more is read too.
SLOW = 10
# Readings at even intervals could beat with the driver's own; these are up to a fifth early or late.
JITTER = 0.2
NO_DEVICE = "no NVIDIA device is measured"


class Begin(msgspec.Struct, frozen=True, tag=True):
    """Begin window `id`, and forget any before. `index`: CUDA's device, None on a CPU; `uuid`: what the measured
    process calls it; `pid`: that process; without `sampled`, only the window's edges are read."""

    id: int
    index: int | None
    uuid: str | None = None
    pid: int | None = None
    sampled: bool = True


class End(msgspec.Struct, frozen=True, tag=True):
    """End window `id` and answer with its telemetry; `idle_w`: watts of the idle device, or why they are not known."""

    id: int
    loop: Loop | None
    idle_w: float | str


class Answer(msgspec.Struct, frozen=True, tag=True):
    """What a row says of window `id`."""

    id: int
    telemetry: dict[str, int | float | str | list[str] | dict[str, str] | None]


Request: TypeAlias = Begin | End
REQUESTS: msgspec.json.Decoder[Request] = msgspec.json.Decoder(Request)


class Reader:
    """Reads one window: its edges, and between them as often as it is asked to."""

    def __init__(self, begin: Begin, devices: Devices) -> None:
        self.begin = begin
        self._cpu_s = time.process_time()
        self._host = Host(begin.pid)
        found = NO_DEVICE if begin.index is None else devices.find(begin.index, begin.uuid)
        self._device, self._no_device = (None, found) if isinstance(found, str) else (found, "")
        if self._device:
            self._device.begin()
        self._readings: list[Reading] = []
        self.read(edge=True)

    def read(self, *, edge: bool = False) -> None:
        """Take a reading, at the window's edge or inside."""
        slow = edge or len(self._readings) % SLOW == 1
        at = time.monotonic()
        values, missing = self._host.read(slow=slow)
        if self._device:
            more, lacking = self._device.read(slow=slow, edge=edge)
            values, missing = values | more, missing | lacking
        self._readings.append(Reading(at, values, missing))

    def end(self, request: End) -> Answer:
        """Read the second edge; return what a row says."""
        self.read(edge=True)
        found = Window(
            readings=tuple(self._readings),
            cpu_s=time.process_time() - self._cpu_s,
            no_device=self._no_device,
            rings=self._device.rings() if self._device else {},
            gpm=self._device.gpm() if self._device else {},
        )
        return Answer(request.id, window.summarise(found, request.loop, request.idle_w))


def serve(pipe: Connection, devices: Devices) -> None:
    """Answer the parent until it is gone."""
    reader: Reader | None = None
    due = 0.0
    while True:
        sampled = reader is not None and reader.begin.sampled
        if not pipe.poll(max(0.0, due - time.monotonic()) if sampled else None):
            assert reader is not None
            reader.read()
            due = time.monotonic() + PERIOD_S * random.uniform(1 - JITTER, 1 + JITTER)
            continue
        try:
            request = REQUESTS.decode(pipe.recv_bytes())
        except (EOFError, ConnectionResetError):
            return
        if isinstance(request, Begin):
            reader, due = Reader(request, devices), time.monotonic() + PERIOD_S
        elif reader is not None and reader.begin.id == request.id:
            pipe.send_bytes(msgspec.json.encode(reader.end(request)))
            reader = None


@contextmanager
def _library() -> Generator[ModuleType | str]:
    """Yield NVML, open, or why it is not."""
    try:
        with nvml.library() as found:
            yield found if found is not None else "there is no NVIDIA driver"
    except (InputError, ImportError) as error:
        yield str(error)


def main(descriptor: int) -> None:
    """Serve the pipe at this descriptor until its other end is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to decide on
    with _library() as library, Connection(descriptor) as pipe:
        serve(pipe, Devices(library))


if __name__ == "__main__":
    main(int(sys.argv[1]))
