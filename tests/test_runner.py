"""A sweep has exactly one row for every cell, whatever happens to its children, its disk or itself."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path
from typing import Any

import msgspec
import psutil
import pytest

from bench import children, environment, runner, schedule, store
from bench.cells import Cell, Suite
from bench.measurement import Measurement
from bench.runtimes.roofline import Script
from bench.subjects import Subject
from shortllama.errors import IncomparableError, InputError
from shortllama.shape import ModelShape

SUITE = Suite(
    schema="shortllama.suite/1",
    subjects=("llama-7b", "llama-7b/depth-26"),
    runtimes=("roofline",),
    batch=(1, 2, 4, 8),
    prompt=(12,),
    output=(16,),
    cell_seconds=1.0,
)
SMALL = ModelShape.uniform(
    vocabulary=512, hidden=128, head_dim=32, blocks=6, query_heads=4, kv_heads=4, neurons=512, tied=True
)


@pytest.fixture(scope="module", autouse=True)
def server() -> None:
    """The fork server of this test process: with torch, whichever test starts it."""
    children.serve(children.TORCH_MODULES, environment.child_variables(1))


class Sweep:
    """A suite on a device, ready to be run into a folder, as often as one likes."""

    def __init__(self, folder: Path, suite: Suite = SUITE, device: str = "rtx3090", **more: Any) -> None:
        self.folder = folder
        self.machine = environment.machine(device)
        self.plan = schedule.plan(suite, self.machine.device, subjects=more.pop("subjects", None))
        timeout = more.pop("timeout_s", 60.0)
        script = msgspec.json.encode(Script(**more)).decode()
        self.settings = runner.Settings(suite, self.machine, 1, timeout, script)

    def run(self, watcher: runner.Watcher | None = None) -> Counter[str]:
        return runner.run(self.plan, self.settings, self.folder, watcher or runner.Watcher())

    def rows(self) -> list[Measurement]:
        """The rows; there is exactly one for every planned cell, with the planned id."""
        rows = store.read(self.folder).measurements
        assert sorted(row.cell_id for row in rows) == sorted(one.cell_id for one in self.plan.planned())
        return list(rows)

    def outcomes(self, subject: str = "llama-7b") -> dict[int, str]:
        return {row.cell.batch: row.outcome for row in self.rows() if row.cell.subject == subject}


# -- what happens in children -------------------------------------------------------------------------------------


def test_every_cell_has_its_row_and_every_group_its_frontier(tmp_path: Path) -> None:
    sweep = Sweep(tmp_path)
    assert sweep.run() == {"ok": 8}
    rows = sweep.rows()
    assert {row.simulated for row in rows} == {True}
    assert {row.tokens for row in rows} == {batch * 16 for batch in (1, 2, 4, 8)}
    assert {row.parameters for row in rows if row.cell.subject == "llama-7b"} == {6_738_415_616}
    for row in rows:
        assert row.bounds is not None
        assert row.bounds.achieved == pytest.approx(0.9, abs=0.01)
        assert row.memory.analytic == row.memory.allocated
    results = store.read(tmp_path)
    assert [one.fingerprint["simulated"] for one in results.environments.values()] == [True]
    assert [(one.largest_batch, one.fits, one.fails) for one in results.frontiers] == [(8, (1, 2, 4, 8), ())] * 2
    assert all("lower bound" in (one.reason or "") for one in results.frontiers)
    sessions = {row.cell.subject: row.session.id for row in rows}
    assert len(set(sessions.values())) == 2, "a child process is a session"


def test_an_end_read_off_the_grid_is_told_anew_where_batches_are_added(tmp_path: Path) -> None:
    few = Sweep(tmp_path, msgspec.structs.replace(SUITE, batch=(1,)), oom_from=4, subject="llama-7b")
    few.run()
    Sweep(tmp_path, oom_from=4, subject="llama-7b").run()
    ends = [one for one in store.read(tmp_path).frontiers if one.cell.subject == "llama-7b"]
    assert [(one.largest_batch, one.fits, one.fails) for one in ends] == [(1, (1,), ()), (2, (1, 2), (4,))]
    Sweep(tmp_path, oom_from=4, subject="llama-7b").run()
    assert len(store.read(tmp_path).frontiers) == 4, "nothing new, nothing told"


def test_out_of_memory_implies_larger_batches(tmp_path: Path) -> None:
    sweep = Sweep(tmp_path, oom_from=4, subject="llama-7b")
    assert sweep.run() == {"ok": 6, "oom": 1, "oom-implied": 1}
    rows = {(row.cell.subject, row.cell.batch): row for row in sweep.rows()}
    witness, implied = rows["llama-7b", 4], rows["llama-7b", 8]
    assert "injected at batch 4" in (witness.reason or "")
    assert (implied.outcome, implied.witness) == ("oom-implied", witness.cell_id)
    frontier = {one.cell.subject: one for one in store.read(tmp_path).frontiers}["llama-7b"]
    assert (frontier.largest_batch, frontier.fits, frontier.fails) == (2, (1, 2), (4,))


def test_out_of_memory_implies_longer_outputs_too(tmp_path: Path) -> None:
    suite = msgspec.structs.replace(SUITE, subjects=("llama-7b",), output=(16, 64))
    sweep = Sweep(tmp_path, suite, oom_from=4)
    assert sweep.run() == {"ok": 4, "oom": 1, "oom-implied": 3}
    longer = {row.cell.batch: row.outcome for row in sweep.rows() if row.cell.output == 64}
    assert longer == {1: "ok", 2: "ok", 4: "oom-implied", 8: "oom-implied"}


def test_a_budget_too_small_for_the_weights_leaves_one_witness(tmp_path: Path) -> None:
    suite = msgspec.structs.replace(SUITE, subjects=("llama-7b",), budgets=("4GiB",))
    sweep = Sweep(tmp_path, suite)
    sweep.run()
    assert sweep.outcomes() == {1: "oom", 2: "oom-implied", 4: "oom-implied", 8: "oom-implied"}
    assert store.read(tmp_path).frontiers[0].largest_batch == 0
    witness = next(row for row in sweep.rows() if row.outcome == "oom")
    assert "4GiB on a simulated" in (witness.emulated or "")
    assert (witness.session.id, witness.wall_s) == ("", None), "no child was started to find out"
    assert "are 12.55 GiB, the budget 4GiB has 4.00 GiB" in (witness.reason or "")


@pytest.mark.parametrize(
    ("fault", "expected"),
    [
        ({"fail_from": 4}, {1: "ok", 2: "ok", 4: "failed", 8: "failed"}),
        ({"crash_from": 4}, {1: "ok", 2: "ok", 4: "failed", 8: "failed"}),
        ({"crash_from": 4, "crash_code": -11}, {1: "ok", 2: "ok", 4: "failed", 8: "failed"}),
        ({"crash_from": 4, "crash_code": -9}, {1: "ok", 2: "ok", 4: "oom", 8: "oom-implied"}),
        ({"crash_from": 4, "crash_code": 137}, {1: "ok", 2: "ok", 4: "oom", 8: "oom-implied"}),
        ({"hang_from": 4, "timeout_s": 1.0}, {1: "ok", 2: "ok", 4: "timed-out", 8: "skipped"}),
    ],
)
def test_a_fault_costs_its_own_cells_only(tmp_path: Path, fault: dict[str, Any], expected: dict[int, str]) -> None:
    sweep = Sweep(tmp_path, subject="llama-7b", **fault)
    sweep.run()
    assert sweep.outcomes() == expected
    assert sweep.outcomes("llama-7b/depth-26") == dict.fromkeys((1, 2, 4, 8), "ok")
    for row in sweep.rows():
        assert bool(row.reason) == (row.outcome != "ok")
    assert not leftovers()


def test_a_loading_that_never_ends_costs_one_timeout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner.worker, "run", sleep)
    sweep = Sweep(tmp_path, msgspec.structs.replace(SUITE, subjects=("llama-7b",)), timeout_s=0.5)
    sweep.run()
    assert sweep.outcomes() == {1: "timed-out", 2: "skipped", 4: "skipped", 8: "skipped"}


def sleep(job: bytes, send: Any) -> None:
    """Entry of a child that never says a word."""
    import time

    time.sleep(600)


def leftovers() -> list[psutil.Process]:
    """Measuring children that are still alive; the fork server itself and the resource tracker have no parent here."""
    mine = psutil.Process().children(recursive=True)
    servers = [one for one in mine if one.ppid() == os.getpid()]
    return [one for one in mine if one not in servers and one.status() != psutil.STATUS_ZOMBIE]


# -- resume -------------------------------------------------------------------------------------------------------


class Interrupt(runner.Watcher):
    """Presses Ctrl-C when a number of rows are written."""

    def __init__(self, after: int) -> None:
        self._left = after

    def finished(self, row: Measurement) -> None:
        self._left -= 1
        if self._left == 0:
            raise KeyboardInterrupt


@pytest.mark.parametrize("after", range(1, 9))
def test_an_interrupted_sweep_resumes_without_loss_or_repeat(tmp_path: Path, after: int) -> None:
    sweep = Sweep(tmp_path, oom_from=4, subject="llama-7b")
    with pytest.raises(KeyboardInterrupt):
        sweep.run(Interrupt(after))
    assert not leftovers()
    before = store.file_of(tmp_path).read_bytes()
    assert len(store.read(tmp_path).measurements) == after
    assert sweep.run() == {"ok": 6, "oom": 1, "oom-implied": 1}
    assert store.file_of(tmp_path).read_bytes().startswith(before), "finished rows stay as they are"
    sweep.rows()
    assert len(store.read(tmp_path).frontiers) == 2
    assert len(store.read(tmp_path).environments) == 1


def test_a_finished_run_resumes_to_itself(tmp_path: Path) -> None:
    sweep = Sweep(tmp_path)
    counts = sweep.run()
    before = store.file_of(tmp_path).read_bytes()
    assert sweep.run() == counts
    assert store.file_of(tmp_path).read_bytes() == before


def test_a_torn_line_is_measured_again(tmp_path: Path) -> None:
    sweep = Sweep(tmp_path)
    sweep.run()
    file = store.file_of(tmp_path)
    lines = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(b"".join(lines[:3]) + lines[3][:100])
    assert sweep.run() == {"ok": 8}
    sweep.rows()


def test_a_run_of_another_environment_is_not_continued(tmp_path: Path) -> None:
    Sweep(tmp_path).run()
    with pytest.raises(IncomparableError, match="another --out"):
        Sweep(tmp_path, noise=0.1).run()


# -- the disk -----------------------------------------------------------------------------------------------------


def test_a_full_disk_ends_the_sweep_and_leaves_a_valid_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, written = store.Writer.write, [0]

    def write(self: store.Writer, row: Any) -> None:
        written[0] += 1
        if written[0] == 5:
            monkeypatch.setattr(os, "write", full)
        real(self, row)

    def full(file: int, data: bytes) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(store.Writer, "write", write)
    sweep = Sweep(tmp_path)
    with pytest.raises(InputError, match="No space left on device"):
        sweep.run()
    monkeypatch.undo()
    assert not leftovers()
    assert len(store.read(tmp_path).measurements) == 3
    assert sweep.run() == {"ok": 8}
    sweep.rows()


# -- a real device ------------------------------------------------------------------------------------------------


def test_a_cpu_sweep_measures_until_memory_really_ends(tmp_path: Path) -> None:
    suite = Suite(
        schema="shortllama.suite/1",
        subjects=("small",),
        runtimes=("eager", "static"),
        dtypes=("float32",),
        batch=(1, 8, 512, 1024),
        prompt=(12,),
        output=(16,),
        budgets=("48MiB",),
        cell_seconds=0.05,
    )
    subjects = {"small": Subject("small", SMALL, "small")}
    sweep = Sweep(tmp_path, suite, "cpu", subjects=subjects)
    assert sweep.run() == {"ok": 4, "oom": 2, "oom-implied": 2}
    for row in sweep.rows():
        assert not row.simulated
        assert "RLIMIT_DATA" in (row.emulated or "")
        if row.outcome == "oom":
            assert "DefaultCPUAllocator: can't allocate memory" in (row.reason or "")
            assert row.cell.batch == 512
        if row.outcome == "ok":
            assert row.tokens == row.cell.batch * 16
            assert len(row.samples.step_s) == 15
            assert row.memory.allocated is not None
            assert 6 << 20 < row.memory.allocated < 48 << 20
            assert set(row.memory.reasons) == {"reserved", "device_used", "context", "first_call"}
            assert row.bounds is not None
            assert row.bounds.roof_s is None, "the peaks of a processor are not known"
    (one,) = store.read(tmp_path).environments.values()
    assert one.fingerprint["threads"] == 1
    assert one.fingerprint["wait_policy"] == "passive"
    assert [frontier.largest_batch for frontier in store.read(tmp_path).frontiers] == [8, 8]


def test_a_cell_without_budget_is_probed_and_measured(tmp_path: Path) -> None:
    suite = Suite(
        schema="shortllama.suite/1",
        subjects=("small",),
        runtimes=("eager",),
        dtypes=("float32",),
        batch=(2,),
        output=(4,),
        cell_seconds=0.05,
    )
    sweep = Sweep(tmp_path, suite, "cpu", subjects={"small": Subject("small", SMALL, "small")})
    assert sweep.run() == {"ok": 1}
    (row,) = sweep.rows()
    assert row.emulated is None
    assert row.memory.allocated is not None
    assert row.cell == Cell("small", "eager", "float32", "sdpa", 12, 4, "none", 2)
