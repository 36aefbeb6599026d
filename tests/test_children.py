"""Children are heard, timed out, and ended with everything they started."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable

import psutil
import pytest

from bench import children, environment


@pytest.fixture(scope="module", autouse=True)
def server() -> None:
    """The fork server of this test process: with torch, whichever test starts it."""
    children.serve(children.TORCH_MODULES, environment.child_variables(1))


def say_nothing(job: bytes, send: Callable[[bytes], None]) -> None:
    time.sleep(600)


def leave(job: bytes, send: Callable[[bytes], None]) -> None:
    send(b"1")
    os.write(2, b"last words\n")
    os._exit(json.loads(job))


def die(job: bytes, send: Callable[[bytes], None]) -> None:
    os.kill(os.getpid(), json.loads(job))


def have_children(job: bytes, send: Callable[[bytes], None]) -> None:
    started = psutil.Popen(["sleep", "600"])
    send(json.dumps([os.getpid(), started.pid]).encode())
    time.sleep(600)


def describe(job: bytes, send: Callable[[bytes], None]) -> None:
    names = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY")
    ignored = signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    send(json.dumps([[os.environ.get(name) for name in names], ignored]).encode())


def test_silence_is_noticed_and_the_child_ended() -> None:
    with children.Child(say_nothing, b"", {}) as child:
        pid = child.pid
        with pytest.raises(children.Silence):
            child.receive(0.1)
    assert not psutil.pid_exists(pid)


def test_a_child_that_leaves_is_heard_to_the_end() -> None:
    with children.Child(leave, b"7", {}) as child:
        assert child.receive(30) == b"1"
        with pytest.raises(children.Ended) as caught:
            child.receive(30)
    assert (caught.value.exit_code, caught.value.signal, caught.value.words) == (7, None, "last words")


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_child_ended_by_a_signal_says_which(number: int) -> None:
    with children.Child(die, json.dumps(int(number)).encode(), {}) as child, pytest.raises(children.Ended) as caught:
        child.receive(30)
    assert (caught.value.exit_code, caught.value.signal) == (None, number)


def test_ending_a_child_ends_what_it_started() -> None:
    with children.Child(have_children, b"", {}) as child:
        pids = json.loads(child.receive(30))
        assert all(psutil.pid_exists(pid) for pid in pids)
    assert not any(alive(pid) for pid in pids)


def alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_a_child_has_its_variables_and_ignores_interrupts() -> None:
    with children.Child(describe, b"", environment.child_variables(1)) as child:
        variables, ignored = json.loads(child.receive(60))
    assert variables == ["1", "passive"]
    assert ignored
