"""Experiments: in turn, until clear, resumable; two revisions from worktrees that vanish; two models by their cells."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench import ab, conduct, experiment, sessions, sides, store
from bench.cells import Cell
from bench.comparison import Comparison, exit_code
from bench.experiment import Design
from bench.filters import parse
from bench.measurement import Frontier, Measurement, environment
from bench.sequential import Looks
from bench.store import Results
from shortllama.errors import IncomparableError, InputError
from tests.test_comparison import cell, row, session

ROOT = Path(__file__).parent.parent
WHERE = environment({"simulated": False, "device": "x"}, {})
DESIGN = Design("id", "main (abc)", "topic (def)", notes=("a note",))


class Machine:
    """Sessions of a simulated machine: equal code but for `factors` on the head, by batch."""

    def __init__(self, factors: dict[int, float], *, between: float = 0.01, seed: int = 0) -> None:
        self.factors, self.between, self.source = factors, between, random.Random(seed)
        self.asked: list[tuple[str, tuple[int, ...]]] = []
        self.change: Callable[[str, Measurement], Measurement] = lambda side, one: one

    def __call__(self, side: str, cells: Sequence[Cell]) -> Results:
        self.asked.append((side, tuple(one.batch for one in cells)))
        rows = [self.change(side, self._row(side, one)) for one in cells]
        ends = (Frontier(cells[0].group, "theirs", 8, False, fits=(8,), fails=(9,)),)
        return Results(Path("run"), {}, tuple(rows), ends)

    def _row(self, side: str, one: Cell) -> Measurement:
        factor = self.factors.get(one.batch, 1.0) if side == "head" else 1.0
        return row(one, session(self.source, factor, between=self.between), environment="theirs")


def run(
    folder: Path, machine: Machine, batches: Sequence[int] = (1,), design: Design = DESIGN, where: Any = WHERE
) -> Comparison:
    for side in experiment.SIDES:
        (folder / side).mkdir(parents=True, exist_ok=True)
    return conduct.conduct(design, [cell(one) for one in batches], folder, {False: where}, machine)


def rows(folder: Path, side: str) -> tuple[Measurement, ...]:
    return store.read(folder / side).measurements


# -- the decisions ----------------------------------------------------------------------------------------------------


def test_sides_alternate_so_that_drift_cancels(tmp_path: Path) -> None:
    machine = Machine({1: 2.0})
    run(tmp_path, machine)
    assert [side for side, _ in machine.asked] == ["base", "head", "head", "base"] * 2 + ["base", "head"]
    found = [(one.session.pair, one.session.order) for one in rows(tmp_path, "head")]
    assert found == [(1, "AB"), (2, "BA"), (3, "AB"), (4, "BA"), (5, "AB")]


def test_cells_that_are_clear_end_and_the_others_go_on(tmp_path: Path) -> None:
    machine = Machine({1: 1.3, 2: 1.0, 3: 0.7}, between=0.03, seed=1)
    found = run(tmp_path, machine, (1, 2, 3))
    by_batch = {one.cell: one.decision for one in found.changes if one.metric == "latency"}
    verdicts = {label.split(" M")[1][0]: one.verdict for label, one in by_batch.items()}
    assert verdicts == {"1": "regressed", "2": "inconclusive", "3": "improved"}
    asked = [batches for _, batches in machine.asked]
    assert asked[:10] == [(1, 2, 3)] * 10
    assert asked[-1] == (2,)
    assert len(asked) == 24
    assert found.notes == ("a note",)


def test_the_verdict_is_reproduced_from_the_files(tmp_path: Path, run_command: Callable) -> None:
    found = run(tmp_path, Machine({1: 1.04}, between=0.01), (1, 2))
    done = run_command("compare", tmp_path / "base", tmp_path / "head", "--json")
    assert done.returncode == exit_code(found) == 1
    assert json.loads(done.stdout)["comparison"] == json.loads(msgspec.json.encode(found))


def test_between_looks_the_level_is_that_of_the_design(tmp_path: Path) -> None:
    """Three pairs of at least five decide nothing, however clear they are."""
    machine = Machine({1: 3.0})
    calls = 0

    def stop_after_three_pairs(side: str, one: Measurement) -> Measurement:
        nonlocal calls
        calls += 1
        if calls > 6:
            raise KeyboardInterrupt
        return one

    machine.change = stop_after_three_pairs
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, machine)
    base, head = (store.read(tmp_path / side) for side in experiment.SIDES)
    found = conduct.comparison.compare(base, head)
    decision = next(one.decision for one in found.changes if one.metric == "latency")
    assert (decision.verdict, decision.reason) == ("inconclusive", "3 of 5 pairs so far")


def test_a_cell_that_runs_on_one_side_only_is_decided_at_once(tmp_path: Path) -> None:
    machine = Machine({})
    machine.change = lambda side, one: (
        msgspec.structs.replace(one, outcome="oom") if side == "head" and one.cell.batch == 2 else one
    )
    found = run(tmp_path, machine, (1, 2))
    assert [one.decision.verdict for one in found.changes if one.metric == "outcome"] == ["regressed"]
    assert {batches for _, batches in machine.asked[2:]} == {(1,)}


def test_largest_batches_are_those_of_the_first_pair(tmp_path: Path) -> None:
    run(tmp_path, Machine({1: 2.0}))
    assert len(store.read(tmp_path / "base").frontiers) == 1


@given(st.integers(1, 20), st.integers(1, 12), st.integers(0, 8), st.data())
def test_open_cells_are_those_that_are_inconclusive(pairs: int, first: int, more: int, data: st.DataObject) -> None:
    looks = Looks(first, first + more)
    cells = [cell(batch) for batch in range(1, 5)]
    verdicts = {
        one.id: data.draw(st.sampled_from(["inconclusive", "regressed", "equivalent", None]), label=one.label)
        for one in cells
    }
    known = {key: value for key, value in verdicts.items() if value}
    found = experiment.open_cells(cells, known, pairs, looks)
    assert found == tuple(one for one in cells if verdicts[one.id] == "inconclusive" and pairs < looks.most)
    assert experiment.open_cells(cells, known, 0, looks) == tuple(cells)


# -- throttling -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("telemetry", "redone"),
    [
        ({}, False),
        ({"throttle_reasons": None}, False),
        ({"throttle_reasons": []}, False),
        ({"throttle_reasons": ["sw_power_cap"]}, False),
        ({"throttle_reasons": ["sw_thermal_slowdown"]}, True),
        ({"throttle_reasons": ["sw_power_cap", "hw_slowdown"]}, True),
    ],
)
def test_heat_and_hardware_slowdown_spoil_a_pair_and_power_caps_do_not(telemetry: dict[str, Any], redone: bool) -> None:
    assert (experiment.throttled([row(cell(), [1.0], telemetry=telemetry)]) is not None) == redone


def test_a_throttled_pair_is_measured_again(tmp_path: Path) -> None:
    machine = Machine({1: 2.0})
    hot = {"throttle_reasons": ["sw_thermal_slowdown"]}
    machine.change = lambda side, one: (
        msgspec.structs.replace(one, telemetry=hot) if len(machine.asked) in (3, 4) else one
    )
    run(tmp_path, machine)
    assert [side for side, _ in machine.asked[:6]] == ["base", "head", "head", "base", "head", "base"]
    assert [one.session.pair for one in rows(tmp_path, "base")] == [1, 2, 3, 4, 5]
    assert not any(one.telemetry for one in rows(tmp_path, "head"))


def test_a_device_that_stays_hot_ends_the_experiment_and_keeps_its_pairs(tmp_path: Path) -> None:
    machine = Machine({1: 2.0})
    machine.change = lambda side, one: (
        msgspec.structs.replace(one, outcome="unstable", reason="clocks") if len(machine.asked) > 4 else one
    )
    with pytest.raises(IncomparableError, match=r"pair 3 was throttled 3 times .*clocks.*--resume"):
        run(tmp_path, machine)
    assert [one.session.pair for one in rows(tmp_path, "base")] == [1, 2]
    machine.change = lambda side, one: one
    assert exit_code(run(tmp_path, machine)) == 1


# -- interruptions ----------------------------------------------------------------------------------------------------


@settings(max_examples=25)
@given(st.integers(0, 9), st.integers(0, 60))
def test_a_kill_costs_the_pair_at_hand_and_nothing_else(tmp_path_factory: Any, killed: int, torn: int) -> None:
    folder = tmp_path_factory.mktemp("run")
    machine = Machine({1: 2.0, 2: 2.0})

    def kill(side: str, one: Measurement) -> Measurement:
        if len(machine.asked) > killed:
            raise KeyboardInterrupt
        return one

    machine.change = kill
    with pytest.raises(KeyboardInterrupt):
        run(folder, machine, (1, 2))
    head = folder / "head" / "measurements.jsonl"
    if head.exists():  # as if the kill had come while the head's rows were written
        head.write_bytes(head.read_bytes()[: -torn or None])
    machine.change, machine.asked = lambda side, one: one, []
    run(folder, machine, (1, 2))
    for side in experiment.SIDES:
        found = sorted((one.session.pair, one.cell.batch) for one in rows(folder, side))
        assert found == [(pair, batch) for pair in range(1, 6) for batch in (1, 2)]
    assert len(machine.asked) <= 10 - 2 * (killed // 2) + 2


def test_an_experiment_is_not_continued_in_another_environment(tmp_path: Path) -> None:
    run(tmp_path, Machine({1: 2.0}))
    with pytest.raises(IncomparableError, match="device: x -> y"):
        run(tmp_path, Machine({}), where=environment({"simulated": False, "device": "y"}, {}))


# -- sessions ---------------------------------------------------------------------------------------------------------

some_cells = st.lists(
    st.builds(
        Cell,
        subject=st.sampled_from(["a", "b/ppl:0.2", 'it\'s "odd"']),
        runtime=st.sampled_from(["eager", "static"]),
        dtype=st.just("float32"),
        attention=st.just("sdpa"),
        prompt=st.sampled_from([1, 12]),
        output=st.sampled_from([4, 8]),
        budget=st.sampled_from(["none", "1GiB"]),
        batch=st.integers(1, 4),
    ),
    unique=True,
    min_size=2,
    max_size=12,
)


@given(some_cells, st.data())
def test_the_expression_of_a_session_chooses_exactly_its_cells(cells: list[Cell], data: st.DataObject) -> None:
    wanted = data.draw(st.lists(st.sampled_from(cells), unique=True, min_size=1))
    keep = parse(sessions.expression(wanted))
    assert {one for one in cells if keep(one)} == set(wanted)


def test_rows_come_back_under_the_names_of_the_experiment() -> None:
    cells = [cell(batch, subject="/tmp/x") for batch in (1, 2)]
    implied = row(cells[1], outcome="oom-implied", witness=cells[0].id)
    found = sessions._renamed(
        Results(Path("run"), {}, (row(cells[0], outcome="oom"), implied), (Frontier(cells[0].group, "e", 1, False),)),
        {"/tmp/x": "reference/ppl:0.2"},
    )
    expected = [cell(batch, subject="reference/ppl:0.2") for batch in (1, 2)]
    assert [one.cell for one in found.measurements] == expected
    assert [one.cell_id for one in found.measurements] == [one.id for one in expected]
    assert found.measurements[1].witness == expected[0].id
    assert found.frontiers[0].cell.subject == "reference/ppl:0.2"


# -- the command ------------------------------------------------------------------------------------------------------

SUITE = """schema = "shortllama.suite/1"
subjects = ["llama-7b", "llama-7b/depth:26"]
runtimes = ["roofline"]
batch = [1, 4]
output = [8]
"""
SIMULATED = ("--device", "rtx3090", "--suite", "mine.toml")


@pytest.fixture
def place(tmp_path: Path) -> Path:
    (tmp_path / "mine.toml").write_text(SUITE)
    return tmp_path


def test_two_models_are_paired_by_the_cell_without_its_subject(place: Path, run_command: Callable) -> None:
    done = run_command(
        "ab", "--base", "llama-7b", "--head", "llama-7b/depth:20", *SIMULATED, "--out", "run", "--json", cwd=place
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)["comparison"]
    assert found["notes"] == ["base is llama-7b, head is llama-7b/depth:20: cells are paired by all but their subject"]
    latency = [one for one in found["changes"] if one["metric"] == "latency"]
    assert [one["decision"]["verdict"] for one in latency] == ["improved", "improved"]
    assert {one["subject"] for one in latency} == {"llama-7b -> llama-7b/depth:20"}
    for side, subject in (("base", "llama-7b"), ("head", "llama-7b/depth:20")):
        assert {one.cell.subject for one in rows(place / "run", side)} == {subject}
        assert f'subjects = ["{subject}"]' in (place / "run" / side / "suite.toml").read_text()
    back = run_command(
        "ab", "--base", "llama-7b/depth:20", "--head", "llama-7b", *SIMULATED, "--cells", "batch==1", "--out", "b",
        cwd=place,
    )  # fmt: skip
    assert back.returncode == 1
    assert "1 cells: " in back.stdout


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """This project with three commits: as it is, with a slower simulated device, and with another pin of torch."""
    folder = tmp_path_factory.mktemp("repository")
    ignored = shutil.ignore_patterns("__pycache__", "*.safetensors")
    for package in ("bench", "shortllama"):
        shutil.copytree(ROOT / package, folder / package, ignore=ignored)
    (folder / "constraints.txt").write_text("torch==2.13.0\npytest==9.2.0\n")
    (folder / "mine.toml").write_text(SUITE)

    def git(*arguments: str) -> None:
        who = ("-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false")
        subprocess.run(["git", *who, *arguments], cwd=folder, check=True, capture_output=True)

    def commit(tag: str) -> None:
        git("add", "--all")
        git("commit", "--quiet", "--message", tag)
        git("tag", tag)

    git("init", "--quiet")
    commit("v1")
    simulator = folder / "bench" / "runtimes" / "roofline.py"
    simulator.write_text(simulator.read_text().replace("* script.slow", "* script.slow * 1.15"))
    (folder / "constraints.txt").write_text("torch==2.13.0\npytest==9.3.0\n")
    commit("v2")
    (folder / "constraints.txt").write_text("torch==2.14.0\npytest==9.3.0\n")
    commit("v3")
    (folder / "bench" / "__main__.py").unlink()
    commit("empty")
    git("checkout", "--quiet", "v3")
    return folder


def worktrees(repository: Path) -> int:
    done = subprocess.run(["git", "worktree", "list"], cwd=repository, capture_output=True, text=True, check=True)
    return len(done.stdout.splitlines())


def test_two_revisions_run_by_their_own_code(repository: Path, tmp_path: Path, run_command: Callable) -> None:
    (repository / "mine.toml").write_text(SUITE + "# changed\n")
    done = run_command(
        "ab", "--base", "v1", "--head", "v2", *SIMULATED, "--out", tmp_path / "run", "--json", cwd=repository
    )
    (repository / "mine.toml").write_text(SUITE)
    assert done.returncode == 1, done.stderr
    found = json.loads(done.stdout)["comparison"]
    latency = [one["decision"] for one in found["changes"] if one["metric"] == "latency"]
    assert [one["ratio"] for one in latency] == [pytest.approx(1.15, rel=1e-4)] * 4
    assert "base is v1 (" in found["notes"][0]
    assert found["notes"][1] == "dirty worktree: 1 changed file of the repository in neither side"
    assert found["notes"][2].endswith("although constraints.txt differs: pytest 9.2.0 -> 9.3.0")
    assert worktrees(repository) == 1
    again = run_command("compare", tmp_path / "run" / "base", tmp_path / "run" / "head", "--json")
    assert json.loads(again.stdout)["comparison"] == found


def test_a_dirty_working_tree_is_named(repository: Path, tmp_path: Path, run_command: Callable) -> None:
    (repository / "new.py").write_text("")
    done = run_command(
        "ab",
        "--base",
        "v3",
        "--head",
        ".",
        *SIMULATED,
        "--out",
        tmp_path / "run",
        "--cells",
        "batch==1",
        cwd=repository,
    )
    (repository / "new.py").unlink()
    assert done.returncode == 0, done.stderr
    assert "head is the working tree at" in done.stdout
    assert "dirty worktree: head is measured with 1 changed file that no commit holds" in done.stdout


def test_libraries_that_times_depend_on_must_be_pinned_alike(repository: Path, run_command: Callable) -> None:
    done = run_command("ab", "--base", "v2", "--head", "v3", *SIMULATED, "--out", "never", cwd=repository)
    assert done.returncode == 2
    assert "torch 2.13.0 -> 2.14.0; one environment cannot hold both" in done.stderr
    assert not (repository / "never").exists()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("--base", "v0", "--head", "v1"), "--base 'v0' is no git revision of this repository"),
        (("--base", "v1", "--head", "v0"), "--head 'v0' is no git revision of this repository"),
        (("--base", "--upload-pack=x", "--head", "v1"), "is no git revision"),
        (("--base", "empty", "--head", "v1"), "holds no bench/__main__.py"),
        (("--base", "v1", "--head", "llama-7b"), "compare two revisions"),
        (("--base", "nothing", "--head", "nothing"), "is no git revision of this repository, and as a model"),
        (("--base", "v1", "--head", "v2", "--pairs", "1"), "give 2 pairs or more"),
        (("--base", "v1", "--head", "v2", "--pairs", "8-5"), "no more at first than in all"),
        (("--base", "v1", "--head", "v2", "--pairs", "five"), "is no number of pairs"),
        (("--base", "v1", "--head", "v2", "--cells", "batch==3"), "leaves no cell"),
        (("--base", "v1", "--head", "v2", "--suite", "none"), "neither a file nor a shipped suite"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(
    repository: Path, run_command: Callable, arguments: tuple[str, ...], expected: str
) -> None:
    done = run_command("ab", *SIMULATED, *arguments, "--out", "never", cwd=repository)
    assert (done.returncode, done.stdout) == (2, ""), done.stderr
    assert expected in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (repository / "never").exists()
    assert worktrees(repository) == 1


def test_an_experiment_goes_on_only_as_what_it_was_begun_as(place: Path, run_command: Callable) -> None:
    sides_of = ("--base", "llama-7b", "--head", "llama-7b/depth:20")
    first = run_command("ab", *sides_of, *SIMULATED, "--out", "run", cwd=place)
    assert first.returncode == 0, first.stderr
    again = run_command("ab", *sides_of, *SIMULATED, "--out", "run", cwd=place)
    assert "by --resume" in again.stderr
    same = run_command("ab", *sides_of, *SIMULATED, "--out", "run", "--resume", cwd=place)
    assert (same.returncode, same.stdout) == (0, first.stdout)
    for more, expected in (
        (("--pairs", "7"), "begun with looks"),
        (("--cells", "batch==1"), "begun with cells"),
        (("--head", "llama-7b/depth:21"), "begun with head"),
    ):
        other = run_command("ab", *sides_of, *SIMULATED, "--out", "run", "--resume", *more, cwd=place)
        assert other.returncode == 2
        assert expected in other.stderr
    (place / "other").mkdir()
    (place / "other" / "file").touch()
    other = run_command("ab", *sides_of, *SIMULATED, "--out", "other", cwd=place)
    assert "is no experiment" in other.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_leaves_no_process_and_no_worktree(repository: Path, tmp_path: Path, number: int) -> None:
    script = json.dumps({"hang_from": 4})
    process = subprocess.Popen(
        [sys.executable, "-m", "bench", "ab", "--base", "v1", "--head", "v2", *SIMULATED, "--out", tmp_path / "run"],
        cwd=repository, env={**os.environ, "PYTHONPATH": str(ROOT), "SHORTLLAMA_ROOFLINE": script},
        stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    import psutil

    deadline = time.monotonic() + 120
    started: list[psutil.Process] = []
    while time.monotonic() < deadline:
        started = psutil.Process(process.pid).children(recursive=True)
        if len(started) >= 3 and worktrees(repository) == 3:  # sweep, its fork server, its child
            break
        time.sleep(0.2)
    process.send_signal(number)
    _, words = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "go on with --resume" in words
    assert worktrees(repository) == 1
    _, alive = psutil.wait_procs(started, timeout=30)
    assert not alive


def test_a_sweep_that_refuses_is_quoted(place: Path, run_command: Callable) -> None:
    with pytest.raises(InputError, match=r"sweep ended with exit code 2: .*missing\.toml"):
        sessions.launch(sides.HERE, ["sweep", str(place / "missing.toml")])


def test_the_command_imports_no_torch(place: Path) -> None:
    code = (
        "import sys; from shortllama import console; from bench.cli import app; "
        "code = console.run(app, ['ab', '--base', 'llama-7b', '--head', 'llama-7b', '--suite', 'mine.toml', "
        "'--device', 'rtx3090', '--out', 'run', '--cells', 'batch==1']); "
        "sys.exit(' '.join({'torch', 'transformers', 'scipy', 'matplotlib'} & set(sys.modules)) or code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=place,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr


def test_pins_are_read_as_pip_does() -> None:
    text = "# torch==1\n torch==2.13.0 ; python_version>'3'\nHuggingFace_Hub==1.0 # why\nnumpy>=2\n"
    assert sides.pinned(text) == {"torch": "2.13.0", "huggingface-hub": "1.0"}


def test_looks_are_read() -> None:
    assert [ab._looks(text) for text in ("5", "5-8", "12", "20")] == [
        Looks(5, 12),
        Looks(5, 8),
        Looks(12, 12),
        Looks(20, 20),
    ]


def test_equal_code_is_rarely_flagged_by_whole_experiments(tmp_path: Path) -> None:
    """Twenty experiments on a quiet device: 0.2 % of the metrics are expected to regress (see `make gate-study`)."""
    alarms = [exit_code(run(tmp_path / str(seed), Machine({}, seed=seed))) for seed in range(20)]
    assert sum(alarms) <= 1


@pytest.mark.slow
def test_models_that_must_be_pruned_are_pruned_once_and_measured(place: Path, run_command: Callable) -> None:
    """A plan's file against METHOD:RATIO, in real sessions; both remove a quarter of the blocks."""
    planned = run_command("plan", "reference", "--method", "mag", "--ratio", "0.25", "--out", "plan.json", cwd=place)
    assert planned.returncode == 0, planned.stderr
    (place / "real.toml").write_text(
        'schema = "shortllama.suite/1"\nsubjects = ["reference"]\n'
        'dtypes = ["float32"]\noutput = [2]\ncell_seconds = 0.1\n'
    )
    arguments = ("--base", "plan.json", "--head", "reference/mag:0.25", "--suite", "real.toml", "--pairs", "2-2")
    done = run_command("ab", *arguments, "--device", "cpu", "--out", "run", "--json", cwd=place, timeout=580)
    assert done.returncode in (0, 1), done.stderr
    found = json.loads(done.stdout)["comparison"]
    assert "base is the plan plan.json" in found["notes"][0]
    base, head = (rows(place / "run", side) for side in experiment.SIDES)
    assert [one.session.pair for one in base] == [one.session.pair for one in head] == [1, 2]
    assert len({one.session.id for one in (*base, *head)}) == 4
    assert {one.cell.subject for one in base} == {"plan.json"}
    assert {one.cell.subject for one in head} == {"reference/mag:0.25"}
    assert len({one.parameters for one in (*base, *head)}) == 1
    assert all(len(one.samples.call_s) >= 3 for one in (*base, *head))
    assert len(list((place / "run" / "subjects").iterdir())) == 2
