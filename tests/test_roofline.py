"""The simulated device: the model's times, memory that ends where the model says, and the script's faults."""

from __future__ import annotations

import os
import subprocess
import sys

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench import devices, memory, prediction, timing
from bench.cells import Cell
from bench.runtimes import roofline
from bench.runtimes.protocol import Options, OutOfMemory, Session
from bench.runtimes.roofline import RooflineSession, Script
from bench.subjects import Subject, resolve
from shortllama.errors import InputError

LLAMA = resolve("llama-7b")


def open_session(script: Script | None = None, subject: Subject = LLAMA, **changes) -> RooflineSession:
    options = msgspec.structs.replace(Options("float16", "sdpa", "rtx3090", 0, 1), **changes)
    return roofline.open_session(subject, options, script or Script())


def test_a_call_takes_what_the_prediction_says() -> None:
    session: Session = open_session()
    session.prepare(4, 12, 128)
    before = session.clock()
    call = session.call()
    cell = Cell("llama-7b", "roofline", "float16", "sdpa", 12, 128, "none", 4)
    assert call.call_s == pytest.approx(prediction.call_s(LLAMA.shape, cell, devices.lookup("rtx3090")))
    assert session.clock() - before == pytest.approx(call.call_s)
    assert call.call_s == pytest.approx(call.prefill_s + sum(call.step_s))
    assert (len(call.step_s), call.tokens) == (127, 4 * 128)
    assert list(call.step_s) == sorted(call.step_s)


def test_7b_at_batch_1_reaches_nine_tenths_of_the_known_roof() -> None:
    session = open_session()
    session.prepare(1, 12, 128)
    assert 128 / session.call().call_s == pytest.approx(0.9 * 71, rel=0.02)


@settings(max_examples=20, deadline=None)
@given(st.sampled_from(["8GiB", "14GiB", "20GiB", None]), st.integers(1, 200), st.integers(2, 200))
def test_memory_ends_exactly_where_the_model_says(budget: str | None, prompt: int, output: int) -> None:
    room = devices.lookup("rtx3090").memory_bytes if budget is None else int(budget[:-3]) << 30
    largest = memory.largest_batch(LLAMA.shape, "roofline", "float16", prompt, output, room)
    if room < LLAMA.shape.weight_bytes("float16"):
        with pytest.raises(OutOfMemory, match="simulated rtx3090: out of memory"):
            open_session(budget_bytes=room)
        return
    session = open_session(budget_bytes=room)
    session.prepare(largest, prompt, output)
    session.probe()
    assert session.peak_bytes() <= room
    with pytest.raises(OutOfMemory, match="out of memory"):
        _run(session, largest + 1, prompt, output)


def _run(session: Session, batch: int, prompt: int, output: int) -> None:
    session.prepare(batch, prompt, output)
    session.probe()


def test_equal_seeds_give_equal_noise_and_others_other() -> None:
    def calls(seed: int, script_seed: int = 0) -> list[float]:
        session = open_session(Script(seed=script_seed, noise=0.01, drift=0.02, tail=0.05), seed=seed)
        session.prepare(1, 12, 16)
        return [session.call().call_s for _ in range(50)]

    assert calls(0) == calls(0)
    assert calls(0) != calls(1)
    assert calls(0) != calls(0, script_seed=1)


def test_noise_has_the_deviation_it_is_given() -> None:
    session = open_session(Script(noise=0.05))
    session.prepare(1, 12, 2)
    quiet = open_session()
    quiet.prepare(1, 12, 2)
    from math import log
    from statistics import stdev

    exact = quiet.call().call_s
    logs = [log(session.call().call_s / exact) for _ in range(1000)]
    assert stdev(logs) == pytest.approx(0.05, rel=0.1)
    assert sum(logs) / 1000 == pytest.approx(0, abs=0.01)


def test_a_slow_device_is_slower_by_its_factor() -> None:
    fast, slow = open_session(), open_session(Script(slow=1.1))
    for session in (fast, slow):
        session.prepare(1, 12, 16)
    assert slow.call().call_s == pytest.approx(1.1 * fast.call().call_s)


def test_faults_strike_at_their_batch_and_only_the_named_subjects() -> None:
    session = open_session(Script(oom_from=8))
    _run(session, 4, 12, 16)
    with pytest.raises(OutOfMemory, match="injected at batch 8"):
        session.prepare(8, 12, 16)
    session = open_session(Script(fail_from=2))
    with pytest.raises(RuntimeError, match="simulated failure at batch 2"):
        session.prepare(2, 12, 16)
    pruned = Script(oom_from=1, subject="*/depth*")
    _run(open_session(pruned), 1, 12, 16)
    with pytest.raises(OutOfMemory):
        open_session(pruned, resolve("llama-7b/depth:20")).prepare(1, 12, 16)


@pytest.mark.parametrize(("code", "returned"), [(70, 70), (134, 134), (-9, -9)])
def test_a_crash_ends_the_process(code: int, returned: int) -> None:
    program = """
from bench.runtimes import roofline
from bench.runtimes.protocol import Options
from bench.subjects import resolve
session = roofline.open_session(resolve("llama-7b"), Options("float16", "sdpa", "h100", 0, 1))
session.prepare(1, 12, 16)
session.prepare(2, 12, 16)
"""

    script = f'{{"crash_from": 2, "crash_code": {code}}}'
    done = subprocess.run(
        [sys.executable, "-c", program], env={**os.environ, roofline.SCRIPT_VARIABLE: script}, timeout=60, check=False
    )
    assert done.returncode == returned


def test_a_hang_never_returns() -> None:
    program = """
from bench.runtimes import roofline
from bench.runtimes.protocol import Options
from bench.subjects import resolve
script = roofline.Script(hang_from=2)
session = roofline.open_session(resolve("llama-7b"), Options("float16", "sdpa", "h100", 0, 1), script)
session.prepare(1, 12, 16)
print("first", flush=True)
session.prepare(2, 12, 16)
"""
    with pytest.raises(subprocess.TimeoutExpired) as error:
        subprocess.run([sys.executable, "-c", program], timeout=3, capture_output=True, check=False)
    assert error.value.stdout == b"first\n"


def test_a_bad_script_or_device_is_bad_input(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(roofline.SCRIPT_VARIABLE, '{"oom_form": 3}')
    with pytest.raises(InputError, match=r"SHORTLLAMA_ROOFLINE: unknown key \$\.oom_form; did you mean 'oom_from'"):
        roofline.script_from_environment()
    with pytest.raises(InputError, match="device 'abacus' is unknown"):
        open_session(device="abacus")
    with pytest.raises(InputError, match="no known rate for float64"):
        open_session(dtype="float64")


def test_generate_depends_on_the_prompt_alone() -> None:
    session = open_session()
    tokens = session.generate([[1, 2], [3, 4]], 5)
    assert tokens == open_session(Script(noise=0.1)).generate([[1, 2], [3, 4]], 5)
    assert [len(row) for row in tokens] == [5, 5]
    assert all(0 <= token < LLAMA.shape.vocabulary for row in tokens for token in row)


def test_the_timing_rules_run_on_its_clock() -> None:
    session = open_session(Script(noise=0.002))
    session.prepare(1, 12, 128)
    found = timing.measure(session.call, session.clock, timing.careful(20))
    assert (found.stop, found.tokens) == ("interval", 128)
    assert session.clock() > 2
