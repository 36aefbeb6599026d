"""`shortllama oom` on simulated devices with faults, and on this CPU, where memory ends for real."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from bench import children, environment, outcomes, requests, search, store
from bench.frontier import Ask
from bench.measurement import Frontier
from bench.schedule import Group
from bench.search import Tried
from shortllama import console
from shortllama.shape import ModelShape

MIB = 1 << 20
TOML = """schema = "shortllama.suite/1"
subjects = ["llama-7b", "llama-7b/depth-26"]
runtimes = ["roofline"]
dtypes = ["float16"]
batch = [1]
prompt = [12]
output = [128, 512]
budgets = ["24GiB"]
"""
SMALL = ModelShape.uniform(
    vocabulary=512, hidden=128, head_dim=32, blocks=6, query_heads=4, kv_heads=4, neurons=512, tied=True
)


@pytest.fixture(scope="module", autouse=True)
def server() -> None:
    """The fork server of this test process: with torch, whichever test starts it."""
    children.serve(children.TORCH_MODULES, environment.child_variables(1))


@pytest.fixture
def suite(tmp_path: Path) -> Path:
    path = tmp_path / "mine.toml"
    path.write_text(TOML)
    return path


def ended(run_command: Callable, suite: Path, run: Path, *more: object, code: int = 0) -> list[Frontier]:
    done = run_command("oom", suite, "--device", "rtx3090", "--out", run, "--json", *more)
    assert done.returncode == code, done.stderr
    assert [row["cell"]["subject"] for row in json.loads(done.stdout)["frontiers"]]
    return list(store.read(run).frontiers)


# -- simulated ---------------------------------------------------------------------------------------------------------


def test_every_group_gets_its_exact_frontier(run_command: Callable, suite: Path, tmp_path: Path) -> None:
    rows = ended(run_command, suite, tmp_path / "run")
    assert {(row.cell.subject, row.cell.output) for row in rows} == {
        (subject, output) for subject in ("llama-7b", "llama-7b/depth-26") for output in (128, 512)
    }
    for row in rows:
        assert (row.simulated, row.confirmed, row.non_monotone) == (True, True, False)
        assert row.largest_batch == row.predicted, "the simulator's memory is the model's"
        assert row.largest_batch is not None
        assert {row.largest_batch + more for more in (1, 2, 8)} <= set(row.fails)
        assert row.peak_bytes is not None
        assert row.limit_bytes is not None
        assert row.peak_bytes <= row.limit_bytes == 24 << 30
        assert row.emulated == "24GiB on a simulated NVIDIA GeForce RTX 3090"
        assert row.trials <= search.frontier.most_trials(row.largest_batch)


def test_a_finished_search_is_not_made_again(run_command: Callable, suite: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    first = ended(run_command, suite, run)
    written = (run / store.FILE_NAME).read_bytes()
    lines = written.splitlines(keepends=True)
    (run / store.FILE_NAME).write_bytes(b"".join(lines[:-2]) + lines[-2][:40])  # killed while writing a row
    assert ended(run_command, suite, run, "--resume") == [
        msgspec.structs.replace(row, trial_s=again.trial_s, start_s=again.start_s)
        for row, again in zip(first, store.read(run).frontiers, strict=True)
    ]


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ('{"fail_from": 3}', "simulated failure"),
        ('{"crash_from": 3, "crash_code": 3}', "exit code 3"),
        ('{"hang_from": 3}', "took longer than 1 s"),
    ],
)
def test_a_search_that_breaks_is_null_with_the_reason_and_the_next_goes_on(
    fault: str, said: str, run_command: Callable, suite: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    suite.write_text(TOML.replace("[128, 512]", "[128]"))
    monkeypatch.setenv("SHORTLLAMA_ROOFLINE", json.dumps({**json.loads(fault), "subject": "llama-7b"}))
    broken, whole = sorted(
        ended(run_command, suite, tmp_path / "run", "--timeout", 1, code=1), key=lambda row: row.cell.subject
    )
    assert (broken.largest_batch, broken.confirmed) == (None, False)
    assert said in (broken.reason or "")
    assert "tried 2 times" in (broken.reason or "")
    assert whole.largest_batch == whole.predicted


def test_a_budget_below_the_weights_needs_no_trial(run_command: Callable, suite: Path, tmp_path: Path) -> None:
    rows = ended(run_command, suite, tmp_path / "run", "--budget", "11GiB")
    dense = [row for row in rows if row.cell.subject == "llama-7b"]
    assert {(row.largest_batch, row.trials) for row in dense} == {(0, 0)}
    assert "12.55 GiB" in (dense[0].reason or "")
    assert {row.largest_batch for row in rows if row not in dense} > {0} - {0}


@pytest.mark.parametrize(
    ("command", "told"),
    [
        (["oom", "gone.toml"], "gone.toml"),
        (["oom", "SUITE", "--device", "rtx3090", "--budget", "1GiB"], "nothing would be measured"),
        (["oom", "SUITE", "--device", "rtx3090", "--runtime", "eager"], "--runtime roofline"),
        (["oom", "SUITE", "--device", "rtx3090", "--cells", "batch==2"], "--cells"),
    ],
)
def test_a_mistake_is_one_line(command: list[str], told: str, suite: Path, capsys: pytest.CaptureFixture) -> None:
    from bench.cli import app

    assert console.run(app, [part.replace("SUITE", str(suite)) for part in command]) == 2
    seen = capsys.readouterr()
    assert (seen.out, seen.err.count("\n")) == ("", 1)
    assert told in seen.err


def test_the_table_reads_well(run_command: Callable, suite: Path, tmp_path: Path) -> None:
    suite.write_text(TOML.replace("[128, 512]", "[128]").replace(', "llama-7b/depth-26"', ""))
    done = run_command("oom", suite, "--device", "rtx3090", "--out", tmp_path / "run")
    heads, row = done.stdout.splitlines()
    assert heads.split() == ["where", "largest", "batch", "predicted", "peak", "trials", "seconds"]
    assert row.startswith("llama-7b roofline float16 P12 L128 budget 24GiB")


# -- for real ----------------------------------------------------------------------------------------------------------


def real(runtime: str, budget: str) -> tuple[Group, requests.runner.Settings]:
    from bench import schedule
    from bench.cells import Suite
    from bench.subjects import Subject

    chosen = Suite(
        schema="shortllama.suite/1", subjects=("small",), runtimes=(runtime,), dtypes=("float32",), batch=(1,),
        prompt=(16,), output=(24,), budgets=(budget,),
    )  # fmt: skip
    machine = environment.machine("cpu")
    plan = schedule.plan(chosen, machine.device, subjects={"small": Subject("small", SMALL, "small")})
    return plan.groups[0], requests.runner.Settings(chosen, machine, 1, 120.0)


REAL = """schema = "shortllama.suite/1"
subjects = ["reference/depth:9"]
runtimes = ["static", "eager"]
dtypes = ["float32"]
batch = [1]
prompt = [16]
output = [24]
budgets = ["48MiB"]
"""


@pytest.mark.slow
def test_on_a_cpu_two_commands_agree_to_the_batch(run_command: Callable, suite: Path, tmp_path: Path) -> None:
    """With other hash seeds, so that the heaps of small objects lie differently."""
    suite.write_text(REAL)
    found: list[dict[str, Frontier]] = []
    for name, seed in (("first", "1"), ("second", "2")):
        variables = {"OMP_NUM_THREADS": "1", "PYTHONHASHSEED": seed}
        done = run_command("oom", suite, "--device", "cpu", "--out", tmp_path / name, **variables)
        assert done.returncode == 0, done.stderr
        found.append({row.cell.runtime: row for row in store.read(tmp_path / name).frontiers})
    for runtime in ("static", "eager"):
        first, second = (one[runtime] for one in found)
        assert first.largest_batch == second.largest_batch
        assert first.largest_batch == pytest.approx(first.predicted, rel=0.1)
        assert (first.confirmed, first.non_monotone, first.unsteady) == (True, False, ())
        assert first.peak_bytes == pytest.approx(48 * MIB, rel=0.12)
        assert "RLIMIT_DATA" in (first.emulated or "")
        assert (first.trial_s or 0) > 0


def test_a_trial_says_what_ended_it() -> None:
    group, settings = real("static", "48MiB")
    fits = search.attempt(group, Ask(1), settings)
    assert fits == Tried(1, True, "", fits.peak_bytes, fits.start_s, fits.trial_s)
    over = search.attempt(group, Ask(100_000), settings)
    assert (over.fits, over.peak_bytes) == (False, None)
    assert outcomes.is_out_of_memory(over.reason, limited=True)
