"""The parent's side of the sampler: starts it, says where windows begin and end, and never fails.

A sampler that dies, hangs or cannot be started costs the telemetry of the rows, which then say so, and nothing else.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import msgspec

from bench.telemetry import fields
from bench.telemetry.readings import Loop
from bench.telemetry.sampler import Answer, Begin, End, Request

# NVML may take long on a device in trouble; longer than this is a hang.
PATIENCE_S = 10.0
# Power of the idle device is a mean over this long, before any child has a context on it.
IDLE_S = 4.5
# A device that does more than this while it should be idle has other work to do.
IDLE_BUSY = 0.02


class Sampler:
    """A running sampler for one device (None: a CPU); a context manager. Nothing here raises but for mistakes."""

    def __init__(self, index: int | None, command: tuple[str, ...] = ("-m", "bench.telemetry.sampler")) -> None:
        self.lost = ""  # why there is no sampler any more
        self._index = index
        self._id = 0
        self._idle_w: float | str = "a CPU's power is not read" if index is None else "was not measured when idle"
        self._process: subprocess.Popen[bytes] | None = None
        self._pipe, theirs = multiprocessing.Pipe()
        # As this process finds its modules, and not those of the folder it was started in.
        variables = os.environ | {"PYTHONPATH": os.pathsep.join(part for part in sys.path if part)}
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-P", *command, str(theirs.fileno())],
                pass_fds=[theirs.fileno()], env=variables, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL, start_new_session=True,
            )  # fmt: skip
        except OSError as error:
            self._lose(f"the sampler could not be started ({error.strerror})")
        finally:
            theirs.close()

    def __enter__(self) -> Sampler:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def pid(self) -> int | None:
        """The sampler's process, while there is one."""
        return self._process.pid if self._process and not self.lost else None

    def idle(self, sleep: Callable[[float], None] = time.sleep) -> None:
        """Measure the power of the device while nothing runs on it; takes 4.5 s, and no time on a CPU."""
        if self._index is None or self.lost:
            return
        self.begin(None, None, sampled=False)
        self.end(None)  # answered when it has started
        self.begin(None, None)
        sleep(IDLE_S)
        found = self.end(None)
        busy = found.get("nvml_busy")
        if found["power_w"] is None:
            self._idle_w = fields.reason(found, "power_w") or "was not measured when idle"
        elif busy is None or busy > IDLE_BUSY:
            self._idle_w = "the device was not idle before the sweep" if busy else "it is not known to have been idle"
        else:
            self._idle_w = found["power_w"]

    def begin(self, pid: int | None, uuid: str | None, *, sampled: bool = True) -> None:
        """Begin a window over what process `pid` does on the device that it calls `uuid`; ends one that is open."""
        self._id += 1
        self._send(Begin(self._id, self._index, uuid, pid, sampled))

    def end(self, loop: Loop | None) -> dict[str, Any]:
        """Return the telemetry of the window that was begun last: all of it, or cut to a child's loop."""
        self._send(End(self._id, loop, self._idle_w))
        while not self.lost:
            try:
                if not self._pipe.poll(PATIENCE_S):
                    self._lose(f"the sampler did not answer for {PATIENCE_S:g} s")
                    break
                answer = msgspec.json.decode(self._pipe.recv_bytes(), type=Answer)
            except (EOFError, OSError):
                self._lose("the sampler died" + self._how())
                break
            except msgspec.DecodeError as error:
                self._lose(f"the sampler's answer cannot be read ({error})")
                break
            if answer.id == self._id:  # else of a window that was given up
                return dict(answer.telemetry)
        return fields.absent(self.lost)

    def close(self) -> None:
        """End the sampler."""
        self._lose("the sampler was ended")

    def _send(self, request: Request) -> None:
        if self.lost:
            return
        try:
            self._pipe.send_bytes(msgspec.json.encode(request))
        except OSError:
            self._lose("the sampler died" + self._how())

    def _how(self) -> str:
        """How the process ended, in brackets."""
        assert self._process is not None
        with contextlib.suppress(subprocess.TimeoutExpired):
            code = self._process.wait(1)
            return f" (exit code {code})" if code >= 0 else f" (signal {-code})"
        return ""

    def _lose(self, reason: str) -> None:
        self.lost = self.lost or reason
        self._pipe.close()
        if self._process is not None:
            try:
                self._process.wait(0.5)  # it ends when the pipe does
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
