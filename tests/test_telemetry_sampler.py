"""The sampler as a process: it answers for exactly its window, dies with its parent, and costs nobody else anything."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import psutil
import pytest

from bench import children, environment, runner, schedule, store
from bench.cells import Suite
from bench.measurement import Measurement
from bench.runtimes.roofline import Script
from bench.subjects import Subject
from bench.telemetry import client, fields
from bench.telemetry.client import Sampler
from bench.telemetry.fields import FIELDS, REASONS
from bench.telemetry.readings import Loop
from bench.telemetry.watch import Watch
from shortllama.shape import ModelShape

TESTS = Path(__file__).parent
SMALL = ModelShape.uniform(
    vocabulary=512, hidden=64, head_dim=32, blocks=2, query_heads=2, kv_heads=2, neurons=128, tied=True
)


def busy(seconds: float) -> Loop:
    """Work that long, and say when."""
    since = time.monotonic()
    while time.monotonic() - since < seconds:
        sum(range(1000))
    return Loop(since, time.monotonic(), 3, 30)


def gone(pid: int) -> bool:
    """Whether a process ends within seconds."""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.05)
    return False


# -- windows ----------------------------------------------------------------------------------------------------------


def test_a_window_tells_of_the_process_on_a_host_without_nvml() -> None:
    with Sampler(None) as sampler:
        sampler.begin(os.getpid(), None)  # a window that is given up
        sampler.begin(os.getpid(), None)
        before = time.process_time()
        loop = busy(2.2)
        spent = (time.process_time() - before) / (loop.until_s - loop.since_s)
        row = sampler.end(loop)
        pid = sampler.pid
    assert pid is not None
    assert gone(pid)
    assert list(row) == [*FIELDS, REASONS]
    assert row["cpu_cores"] == pytest.approx(spent, abs=0.15)
    assert row["rss_bytes"] == pytest.approx(psutil.Process().memory_info().rss, rel=0.2)
    assert 0 < row["host_busy"] <= 1
    assert row["readings"] >= 10
    assert 0 < row["sampler_cpu_share"] < 1
    assert row["window_s"] == pytest.approx(loop.until_s - loop.since_s, rel=1e-4)
    assert fields.reason(row, "power_w") == "no NVIDIA device is measured"
    assert row["cpu_mhz"] is not None or fields.reason(row, "cpu_mhz")


def test_a_process_that_ends_in_the_window_is_said() -> None:
    with Sampler(None) as sampler, subprocess.Popen([sys.executable, "-c", "import time; time.sleep(9)"]) as other:
        sampler.begin(other.pid, None)
        other.kill()
        other.wait()
        row = sampler.end(busy(2.1))
    assert fields.reason(row, "cpu_cores") == fields.reason(row, "rss_bytes") == "the measured process ended"
    assert row["host_busy"] is not None


@pytest.fixture
def driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Return put(arguments): the sampler finds a fake driver made with them."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.syspath_prepend(str(TESTS))
    monkeypatch.syspath_prepend(str(tmp_path))

    def put(arguments: str) -> None:
        text = f"import sys\nfrom fake_nvml import Fake\nsys.modules[__name__] = Fake({arguments})\n"
        (tmp_path / "pynvml.py").write_text(text)

    return put


def test_a_device_is_read_across_processes(driver: Callable[[str], None], monkeypatch: pytest.MonkeyPatch) -> None:
    driver("events=4, busy=0.01, power_w=80")
    monkeypatch.setattr(client, "IDLE_S", 2.2)
    with Sampler(0) as sampler:
        sampler.idle()
        sampler.begin(os.getpid(), "GPU-5a", sampled=False)
        edges = sampler.end(None)
        sampler.begin(os.getpid(), "GPU-5a")
        row = sampler.end(busy(2.2))
    assert (edges["throttle_reasons"], edges["thermal_violation_s"], edges["nvml_busy"]) == (["sw_power_cap"], 0, None)
    assert (row["flags"], row["nvml_busy"], row["idle_power_w"]) == (["power-capped"], 0.01, 81.0)
    assert (row["gpm_sm"], row["power_source"]) == (0.8, "ring")


def test_a_device_that_is_busy_has_no_idle_power(
    driver: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    driver("busy=0.5")
    monkeypatch.setattr(client, "IDLE_S", 2.2)
    with Sampler(0) as sampler:
        sampler.idle()
        sampler.begin(None, None, sampled=False)
        assert fields.reason(sampler.end(None), "idle_power_w") == "the device was not idle before the sweep"


def test_on_cuda_the_edges_of_timing_are_read_in_any_case(
    driver: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    driver("events=32")
    with Watch(0) as watch:
        watch.loaded(os.getpid(), "GPU-5a")
        watch.began()
        row = watch.finished()
    assert (row["throttle_reasons"], row["thermal_violation_s"]) == (["sw_thermal_slowdown"], 0)
    assert fields.reason(row, "power_w") == "the sweep was to read no telemetry; give --telemetry"
    monkeypatch.setattr(client, "IDLE_S", 0.0)
    with Watch(0, sampled=True) as watch:
        watch.loaded(os.getpid(), "GPU-5a")
        watch.began()
        timed = watch.finished()
        watch.looping()
        row = watch.looped(busy(2.2), timed)
        lost = watch.broke("it died", timed)
    assert (row["throttle_reasons"], row["nvml_busy"], row["tokens"]) == (["sw_thermal_slowdown"], 0.9, 30)
    assert fields.reason(row, "idle_power_w") == "the window of 0.00 s is shorter than 2 s"
    assert lost["throttle_reasons"] == ["sw_thermal_slowdown"]
    assert fields.reason(lost, "power_w") == "when it was called for the sampler: it died"


# -- death ------------------------------------------------------------------------------------------------------------


def test_a_dead_sampler_is_a_reason() -> None:
    with Sampler(None) as sampler:
        sampler.begin(os.getpid(), None)
        assert sampler.pid is not None
        os.kill(sampler.pid, signal.SIGKILL)
        assert sampler.end(None) == fields.absent("the sampler died (signal 9)")
        sampler.begin(os.getpid(), None)
        assert sampler.end(None) == fields.absent("the sampler died (signal 9)")
        assert sampler.pid is None


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("import time; time.sleep(60)", "did not answer for 3 s"),
        ("import sys; sys.exit(3)", "the sampler died (exit code 3)"),
        (
            "import sys, time; from multiprocessing.connection import Connection; "
            "Connection(int(sys.argv[1])).send_bytes(b'no json'); time.sleep(60)",
            "answer cannot be read",
        ),
    ],
)
def test_a_sampler_that_fails_is_a_reason(code: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "PATIENCE_S", 3.0)
    with Sampler(None, ("-c", code)) as sampler:
        pid = sampler.pid
        sampler.begin(1, None)
        row = sampler.end(None)
    assert said in (fields.reason(row, "cpu_cores") or "")
    assert pid is not None
    assert gone(pid)


def test_a_sampler_that_cannot_be_started_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/no/python")
    with Sampler(0) as sampler:
        sampler.idle()
        sampler.begin(1, None)
        assert "could not be started (No such file" in (fields.reason(sampler.end(None), "cpu_cores") or "")


def test_the_sampler_dies_with_its_parent() -> None:
    code = (
        "import time; from bench.telemetry.client import Sampler; s = Sampler(None); s.begin(1, None); "
        "print(s.pid, flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, cwd=TESTS.parent) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        assert psutil.pid_exists(pid)
        parent.kill()
    assert gone(pid)


# -- sweeps -----------------------------------------------------------------------------------------------------------


class Scripted(Watch):
    """A watch whose timing passes met what `hot` says, one after the other; cool from then on."""

    def __init__(self, hot: list[str]) -> None:
        super().__init__()
        self.hot, self.timed = hot, 0

    def finished(self) -> dict[str, Any]:
        self.timed += 1
        seen = [self.hot.pop(0)] if self.hot else []
        return fields.row({"throttle_reasons": [one for one in seen if one], "flags": []}, {}, "made up")


def simulated(folder: Path, watch: Watch, monkeypatch: pytest.MonkeyPatch) -> tuple[Counter[str], list[Measurement]]:
    children.serve(children.TORCH_MODULES, environment.child_variables(1))
    suite = Suite("shortllama.suite/1", ("llama-7b",), ("roofline",), batch=(1, 2), output=(16,), cell_seconds=1.0)
    machine = environment.machine("rtx3090")
    plan = schedule.plan(suite, machine.device)
    monkeypatch.setattr(runner, "_watch", lambda *_: watch)
    settings = runner.Settings(suite, machine, 1, 60.0, msgspec.json.encode(Script()).decode())
    counts = runner.run(plan, settings, folder, runner.Watcher())
    rows = sorted(store.read(folder).measurements, key=lambda row: row.cell.batch)
    assert [row.cell.batch for row in rows] == [1, 2]
    return counts, rows


def test_a_cell_that_heat_slowed_down_is_measured_once_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    watch = Scripted(["sw_thermal_slowdown"])
    counts, rows = simulated(tmp_path, watch, monkeypatch)
    assert (counts, watch.timed) == ({"ok": 2}, 3)
    assert [row.telemetry["throttle_reasons"] for row in rows] == [[], []]


def test_a_cell_that_stays_hot_is_unstable_and_keeps_its_times(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    watch = Scripted(["", "hw_slowdown", "hw_slowdown"])
    counts, (_, row) = simulated(tmp_path, watch, monkeypatch)
    assert (counts, watch.timed) == ({"ok": 1, "unstable": 1}, 3)
    assert "lowered its clocks (hw_slowdown), and again" in (row.reason or "")
    assert row.samples.call_s


def test_a_power_cap_spoils_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    watch = Scripted(["sw_power_cap", "sw_power_cap"])
    assert (simulated(tmp_path, watch, monkeypatch)[0], watch.timed) == ({"ok": 2}, 2)


class Deadly(Watch):
    """A watch of a CPU that kills the child while it is called for the second cell, and the sampler after that."""

    loops = 0

    def looping(self) -> None:
        super().looping()
        self.loops += 1
        if self.loops == 2:
            assert self._pid is not None
            os.kill(self._pid, signal.SIGKILL)
        if self.loops == 3:
            assert self._sampler is not None
            assert self._sampler.pid is not None
            os.kill(self._sampler.pid, signal.SIGKILL)


def test_a_sweep_on_a_cpu_reads_telemetry_and_survives_all_who_die(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    children.serve(children.TORCH_MODULES, environment.child_variables(1))
    suite = Suite(
        "shortllama.suite/1", ("small",), ("eager",), ("float32",), batch=(1, 2, 4), output=(4,), timing="paper",
        telemetry=True,
    )  # fmt: skip
    machine = environment.machine("cpu")
    plan = schedule.plan(suite, machine.device, subjects={"small": Subject("small", SMALL, "small")})
    monkeypatch.setattr(runner, "_watch", lambda *_: Deadly(None, sampled=True))
    assert runner.run(plan, runner.Settings(suite, machine, 1, 120.0), tmp_path, runner.Watcher()) == {"ok": 3}
    first, second, third = sorted(store.read(tmp_path).measurements, key=lambda row: row.cell.batch)
    assert all(len(row.samples.call_s) == 20 for row in (first, second, third))
    assert first.telemetry["window_s"] >= 2
    assert first.telemetry["tokens"] == 4 * first.telemetry["calls"]
    assert first.telemetry["cpu_cores"] > 0
    assert first.telemetry["rss_bytes"] > 50 << 20
    assert fields.reason(first.telemetry, "nvml_busy") == "no NVIDIA device is measured"
    assert "when it was called for the sampler" in (fields.reason(second.telemetry, "window_s") or "")
    assert second.session != third.session, "the rest is measured in a child of its own"
    assert fields.reason(third.telemetry, "window_s") == "the sampler died (signal 9)"
    assert {tuple(row.telemetry) for row in (first, second, third)} == {(*FIELDS, REASONS)}
