"""Child processes as a parent sees them: started, listened to with a deadline, and ended with everything they started.

All are forked from one server process that has imported torch and done nothing else: a child starts in a fraction of a
second, and equal children have equal memory layouts. Bytes go through a pipe; what they mean is the callers' business.
A child dies with its parent: it watches for that from inside (`enter`). Imports no torch.
"""

from __future__ import annotations

import contextlib
import faulthandler
import multiprocessing
import os
import signal
import tempfile
import threading
from collections.abc import Callable, Iterable, Mapping
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from bench import outcomes
from shortllama.errors import InputError

_CONTEXT = multiprocessing.get_context("forkserver")

# What a measuring child needs. Importing these runs no operation and starts no thread, so forking afterwards is safe.
TORCH_MODULES = (
    "shortllama.quiet",
    "torch",
    "torch._dynamo",
    "transformers.generation",
    "transformers.models.llama.modeling_llama",
    "shortllama.checkpoint",
    "shortllama.surgery",
    "bench.passes.measure",
    "bench.passes.probe",
    "bench.worker",
)
TORCH_FREE_MODULES = ("bench.worker",)

Entry = Callable[[bytes, Callable[[bytes], None]], None]


class Silence(Exception):
    """The child said nothing until the deadline."""


class Ended(Exception):
    """The child is gone. `exit_code` as of a process (None if a signal ended it), `words`: the end of its stderr."""

    def __init__(self, exit_code: int | None, by_signal: int | None, words: str) -> None:
        super().__init__(exit_code, by_signal, words)
        self.exit_code, self.signal, self.words = exit_code, by_signal, words

    @property
    def reason(self) -> str:
        """What is known, in words."""
        return outcomes.classify(self.words, self.exit_code, self.signal).reason


def serve(modules: Iterable[str], variables: Mapping[str, str]) -> None:
    """Choose what children have imported when they start; without effect once the first has been started.

    `variables` are set in this process: the server inherits them, and OpenMP reads them when torch is loaded.
    """
    os.environ.update(variables)
    _CONTEXT.set_forkserver_preload(list(modules))


class Child:
    """A running `entry(job, send)` in a process of its own; a context manager that leaves no process behind."""

    def __init__(self, entry: Entry, job: bytes, variables: Mapping[str, str]) -> None:
        self._log = _new_log()
        self._pipe, theirs = _CONTEXT.Pipe(duplex=False)
        self._process = _CONTEXT.Process(
            target=enter, args=(entry, job, theirs, dict(variables), self._log.name), daemon=True
        )
        try:
            self._process.start()
        except BaseException:
            self._forget()
            raise
        finally:
            theirs.close()

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    @property
    def pid(self) -> int:
        """The process id."""
        assert self._process.pid is not None
        return self._process.pid

    def receive(self, timeout_s: float | None) -> bytes:
        """Return the next message.

        Raises Silence after `timeout_s` (None: never), Ended when there is none and the process is gone.
        """
        if not wait([self._pipe], timeout_s):
            raise Silence
        try:
            return self._pipe.recv_bytes()
        except EOFError:
            self._process.join(10)
            code = self._process.exitcode
            words = self._words()
            raise (Ended(None, -code, words) if code is not None and code < 0 else Ended(code, None, words)) from None

    def kill(self) -> None:
        """End the process and all its descendants; nothing happens where it has ended."""
        if self._process.is_alive():
            _end(self.pid)
            self._process.join(10)
        self._pipe.close()
        self._forget()

    def _forget(self) -> None:
        self._log.close()
        Path(self._log.name).unlink(missing_ok=True)

    def _words(self) -> str:
        """The end of what the child wrote to stderr, on one line."""
        self._log.seek(0)
        return outcomes.one_line(self._log.read().decode(errors="replace")[-500:])


def _new_log() -> Any:
    """A file for what a child writes; the child removes its name, so that nothing is left if both are killed."""
    try:
        return tempfile.NamedTemporaryFile(prefix="shortllama-", suffix=".log", delete=False)
    except OSError as error:
        where = tempfile.gettempdir()
        raise InputError(f"{where}: no temporary file can be written ({error.strerror}); free some space") from error


def _end(pid: int) -> None:
    """Kill a process and its descendants, leaves first; those that end by themselves meanwhile are fine."""
    import psutil

    with contextlib.suppress(psutil.NoSuchProcess):
        top = psutil.Process(pid)
        for process in [*reversed(top.children(recursive=True)), top]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()


# -- inside the child -------------------------------------------------------------------------------------------------


def enter(entry: Entry, job: bytes, pipe: Connection, variables: dict[str, str], log: str) -> None:
    """Run `entry` as a child: quiet, deaf to Ctrl-C (the parent decides), and gone as soon as the parent is."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _follow_parent()
    os.environ.update(variables)
    out = os.open(log, os.O_WRONLY | os.O_APPEND)
    os.unlink(log)
    os.dup2(out, 1)
    os.dup2(out, 2)
    faulthandler.enable(all_threads=False)
    entry(job, pipe.send_bytes)
    pipe.close()


def _follow_parent() -> None:
    """End this process when its parent ends, however that happens (a kill leaves it no chance to tell us).

    PR_SET_PDEATHSIG would not do: the kernel's parent of this process is the fork server, which outlives ours while
    any child lives.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
