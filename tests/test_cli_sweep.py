"""`shortllama sweep` as a user meets it: dry runs, mistakes, kills, full disks, and a run on real weights."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from bench import run_folder, store
from bench.cells import BatchRange, Suite, read_suite, suite_path
from bench.measurement import Measurement
from shortllama import console, files
from shortllama.errors import InputError

ROOT = Path(__file__).parent.parent
TOML = """schema = "shortllama.suite/1"
subjects = ["llama-7b", "llama-7b/depth-26", "llama-7b/wanda-sp-20"]
runtimes = ["roofline"]
dtypes = ["float16"]
batch = {from = 1, factor = 4, until = "oom"}
prompt = [12]
output = [128, 512]
cell_seconds = 1
"""
SIMULATED = ("--device", "rtx3090")


@pytest.fixture
def suite(tmp_path: Path) -> Path:
    path = tmp_path / "mine.toml"
    path.write_text(TOML)
    return path


def planned(run_command: Callable, suite: Path, *more: str) -> list[dict]:
    done = run_command("sweep", suite, "--dry-run", "--json", *SIMULATED, *more)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)["cells"]


def rows_of(run: Path) -> list[Measurement]:
    return list(store.read(run).measurements)


# -- dry runs ---------------------------------------------------------------------------------------------------------


def test_a_dry_run_lists_every_cell_with_predictions(run_command: Callable, suite: Path) -> None:
    cells = planned(run_command, suite)
    assert len({one["cell_id"] for one in cells}) == len(cells)
    assert {one["subject"] for one in cells} == {"llama-7b", "llama-7b/depth-26", "llama-7b/wanda-sp-20"}
    assert {one["expected"] for one in cells} == {"ok", "oom", "oom-implied"}
    for one in cells:
        assert (one["call_s"] > 0) == (one["expected"] == "ok")
        if one["expected"] == "ok":
            assert one["tokens_per_s"] == pytest.approx(one["batch"] * one["output"] / one["call_s"])
        assert (one["memory_bytes"] > 24 << 30) == (one["expected"] != "ok")
    assert sorted(path.name for path in suite.parent.iterdir()) == ["mine.toml"], "a dry run writes nothing"


def test_a_dry_run_for_people_is_a_table(run_command: Callable, suite: Path) -> None:
    done = run_command("sweep", suite, "--dry-run", *SIMULATED, "--cells", "batch==1 and subject=='llama-7b'")
    heads, *rows, total, _, ends, first, second = done.stdout.splitlines()
    assert heads.split() == ["cell", "memory", "call", "tokens/s", "expected"]
    assert len(rows) == 2
    assert "llama-7b roofline float16 M1 P12 L128" in rows[0]
    assert total.startswith("2 cells in 2 groups, about")
    assert ends.startswith("largest batch that fits, by the memory model")
    assert first.startswith("llama-7b roofline float16 P12 L128")
    assert int(first.split()[-3].replace(",", "")) > int(second.split()[-3].replace(",", "")) > 0


def test_a_dry_run_imports_no_torch(suite: Path) -> None:
    code = (
        "import sys; from shortllama import console; from bench.cli import app; "
        f"console.run(app, ['sweep', {str(suite)!r}, '--dry-run', '--device', 'rtx3090']); "
        "sys.exit(' '.join({'torch', 'transformers', 'scipy.stats', 'matplotlib'} & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stderr) == (0, "")


def test_any_device_can_be_planned_for_any_runtime(run_command: Callable, suite: Path) -> None:
    cells = planned(run_command, suite, "--runtime", "eager,static", "--budget", "16GiB", "--cells", "output==128")
    assert {one["runtime"] for one in cells} == {"eager", "static"}
    assert {one["budget"] for one in cells} == {"16GiB"}
    assert {one["output"] for one in cells} == {128}


# -- runs -------------------------------------------------------------------------------------------------------------


def test_a_run_has_one_row_for_every_cell_of_the_dry_run(run_command: Callable, suite: Path) -> None:
    run = suite.parent / "run"
    done = run_command("sweep", suite, *SIMULATED, "--out", run, "--json")
    assert done.returncode == 0, done.stderr
    cells = planned(run_command, suite)
    assert sorted(row.cell_id for row in rows_of(run)) == sorted(one["cell_id"] for one in cells)
    told = json.loads(done.stdout)
    assert told["run"] == str(run)
    assert sum(told["outcomes"].values()) == len(cells)
    assert (run / "suite.toml").read_bytes() == suite.read_bytes()
    assert [path.name for path in run.glob("*.jsonl")] == ["measurements.jsonl"]


def test_the_default_folder_is_named_by_suite_device_and_date(run_command: Callable, suite: Path) -> None:
    done = run_command("sweep", suite, *SIMULATED, "--cells", "batch==1", cwd=suite.parent)
    assert done.returncode == 0, done.stderr
    (run,) = (suite.parent / "runs").iterdir()
    assert run.name.startswith("mine_rtx3090_20")


def test_a_changed_suite_is_kept_as_it_was_run(run_command: Callable, suite: Path) -> None:
    run = suite.parent / "run"
    done = run_command("sweep", suite, *SIMULATED, "--budget", "16GiB", "--cells", "batch==1", "--out", run)
    assert done.returncode == 0, done.stderr
    assert read_suite(str(run / "suite.toml")).budgets == ("16GiB",)
    again = run_command("sweep", suite, *SIMULATED, "--cells", "batch==1", "--out", run, "--resume")
    assert again.returncode == 2
    assert 'begun with budgets = ["16GiB"], now ["none"]' in again.stderr


def test_a_failed_cell_makes_exit_code_1(run_command: Callable, suite: Path) -> None:
    run = suite.parent / "run"
    fault = '{"fail_from": 4, "subject": "llama-7b"}'
    done = run_command(
        "sweep", suite, *SIMULATED, "--out", run, "--cells", "batch<=4 and output==128", SHORTLLAMA_ROOFLINE=fault
    )
    assert done.returncode == 1
    assert "5 ok, 1 failed" in done.stderr or "1 failed, 5 ok" in done.stderr


# -- mistakes ---------------------------------------------------------------------------------------------------------

ONE_CELL = "batch==1 and output==128 and subject=='llama-7b'"
MISTAKES = [
    (["sweep", "qick"], "quick, smoke"),
    (["sweep", "gone.toml"], "gone.toml"),
    (["sweep", "SUITE", "--device", "rtx3091", "--dry-run"], "did you mean rtx3090"),
    (["sweep", "SUITE", "--device", "rtx3090", "--runtime", "eager"], "--runtime roofline"),
    (["sweep", "SUITE", "--device", "rtx3090", "--runtime", "fast"], "unknown runtime 'fast'"),
    (["sweep", "SUITE", "--device", "rtx3090", "--budget", "24GB"], "24GiB"),
    (["sweep", "SUITE", "--device", "rtx3090", "--budget", "4GiB"], "10.19 GiB, the budget 4GiB has 4.00 GiB"),
    (["sweep", "SUITE", "--device", "rtx3090", "--timing", "quick"], "unknown timing 'quick'"),
    (["sweep", "SUITE", "--device", "rtx3090", "--cells", "batch=1"], "--cells"),
    (["sweep", "SUITE", "--device", "rtx3090", "--cells", "batch==3"], "--cells"),
    (["sweep", "SUITE", "--device", "rtx3090", "--timeout", "0"], "--timeout"),
    (["sweep", "SUITE", "--device", "cuda:7"], "cuda:7"),
    (["sweep", "SUITE", "--device", "rtx3090", "--profile", "batch==1"], "leaves 6 cells"),
    (["sweep", "SUITE", "--device", "rtx3090", "--profile", "0123456789abcdef"], "--profile '0123456789abcdef'"),
    (["sweep", "SUITE", "--device", "rtx3090", "--profile", ONE_CELL], "is simulated"),
    (["sweep", "SUITE", "--device", "cpu", "--runtime", "eager,cudagraph"], "cudagraph needs a CUDA device"),
    (["sweep", "SUITE", "--device", "rtx3090", "--out", "SUITE"], "is a file"),
    (["sweep", "SUITE", "--device", "rtx3090", "--out", "FOREIGN"], "not a run"),
    (["sweep", "SUITE", "--device", "rtx3090", "--out", "FOREIGN", "--resume"], "not a run"),
    (["sweep", "SUITE", "--device", "rtx3090", "--out", "SUITE/deeper"], "cannot be written"),
    (["report", "FOREIGN", "--out", "report"], "measurements.jsonl"),
    (["compare", "FOREIGN", "FOREIGN"], "measurements.jsonl"),
]


@pytest.mark.parametrize(("command", "told"), MISTAKES, ids=[" ".join(command) for command, _ in MISTAKES])
def test_a_mistake_is_one_line_and_leaves_nothing(
    command: list[str], told: str, suite: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    from bench.cli import app

    monkeypatch.chdir(suite.parent)
    foreign = suite.parent / "foreign"
    foreign.mkdir()
    (foreign / "thesis.txt").write_text("mine")
    before = sorted(suite.parent.rglob("*"))
    given = [part.replace("SUITE", "mine.toml").replace("FOREIGN", "foreign") for part in command]
    assert console.run(app, given) == 2
    seen = capsys.readouterr()
    assert seen.out == ""
    assert seen.err.count("\n") == 1
    assert told in seen.err
    assert sorted(suite.parent.rglob("*")) == before


def test_an_unknown_suite_key_is_named_with_its_path(
    suite: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    from bench.cli import app

    suite.write_text(TOML.replace("prompt =", "promt ="))
    assert console.run(app, ["sweep", str(suite), "--dry-run"]) == 2
    assert "unknown key $.promt; did you mean 'prompt'?" in capsys.readouterr().err


def test_a_corrupt_checkpoint_is_refused_before_anything_is_written(
    stories: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    from bench.cli import app

    copy = tmp_path / "model"
    copy.mkdir()
    for path in stories.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    text = TOML.replace('"llama-7b", "llama-7b/depth-26", "llama-7b/wanda-sp-20"', json.dumps(str(copy)))
    (tmp_path / "s.toml").write_text(text.replace("roofline", "eager").replace("float16", "float32"))
    code = console.run(app, ["sweep", str(tmp_path / "s.toml"), "--device", "cpu", "--out", str(tmp_path / "run")])
    seen = capsys.readouterr().err
    assert (code, seen.count("\n")) == (2, 1)
    assert "model.safetensors" in seen
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("written", ["suite only", "rows"])
def test_an_existing_run_needs_resume(tmp_path: Path, written: str) -> None:
    suite = read_suite("smoke")
    text = suite_path("smoke").read_bytes()
    run = tmp_path / "run"
    assert run_folder.open_run(run, suite, text, resume=True), "what does not exist is begun"
    if written == "rows":
        (run / store.FILE_NAME).write_text("")
    with pytest.raises(InputError, match="--resume"):
        run_folder.open_run(run, suite, text, resume=False)
    assert not run_folder.open_run(run, suite, text, resume=True)


@pytest.mark.parametrize("batch", [(1, 2), BatchRange(), BatchRange(2, 3, 99)])
def test_a_suite_reads_back_as_it_was_written(batch: tuple[int, ...] | BatchRange) -> None:
    suite = Suite(
        schema="shortllama.suite/1",
        subjects=("llama-7b/flap:26.9±7.5x8577±2078", 'odd "name"\\'),
        batch=batch,
        cell_seconds=0.25,
        perplexity=("self",),
    )
    assert files.decode_toml(run_folder.to_toml(suite), Suite, "suite") == suite


# -- kills and full disks ---------------------------------------------------------------------------------------------


@pytest.fixture
def start(tmp_path: Path):
    """Return start(*arguments) -> a running command in a process of its own, with stderr in the file `told`."""
    started: list[psutil.Popen] = []

    def run(*arguments: object, **env: str) -> psutil.Popen:
        command = [sys.executable, "-m", "bench", *map(str, arguments)]
        with (tmp_path / "told").open("w") as told:
            variables = {**os.environ, "PYTHONPATH": str(ROOT), **env}
            process = psutil.Popen(command, stdout=subprocess.DEVNULL, stderr=told, env=variables)
        started.append(process)
        return process

    yield run
    for process in started:
        for one in alive([process]):
            one.kill()
        process.wait(10)


def wait_for(what: Callable[[], object], seconds: float = 60) -> object:
    end = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)
    return found


def alive(processes: list[psutil.Process]) -> list[psutil.Process]:
    found = []
    for one in processes:
        try:
            if one.is_running() and one.status() != psutil.STATUS_ZOMBIE:
                found.append(one)
        except psutil.NoSuchProcess:
            continue
    return found


def has_rows(run: Path, count: int) -> bool:
    file = run / store.FILE_NAME
    return file.exists() and file.read_bytes().count(b'"kind":"measurement"') >= count


HANG = '{"hang_from": 16, "subject": "llama-7b/depth-26"}'


def test_a_killed_sweep_leaves_no_process_and_resumes(start: Callable, run_command: Callable, suite: Path) -> None:
    run = suite.parent / "run"
    arguments = ("sweep", suite, *SIMULATED, "--out", run)
    process = start(*arguments, SHORTLLAMA_ROOFLINE=HANG)
    # The subject that hangs comes at a seeded place in its set; some rows are there before.
    wait_for(lambda: has_rows(run, 2))
    time.sleep(0.3)
    family = process.children(recursive=True)
    assert family, "the fork server and a child were running"
    process.send_signal(signal.SIGKILL)
    process.wait(10)
    try:
        wait_for(lambda: not alive(family), 10)
    finally:
        for one in alive(family):
            one.kill()

    before = len(rows_of(run))
    with (run / store.FILE_NAME).open("ab") as file:
        file.write(b'{"kind":"measurement","cell":{"sub')  # what a kill in the middle of a write leaves
    cells = planned(run_command, suite)
    assert before < len(cells)
    refused = run_command(*arguments, "--resume")
    assert refused.returncode == 3, "the rows before came from a device with another script"
    done = run_command(*arguments, "--resume", "--timeout", "1", SHORTLLAMA_ROOFLINE=HANG)
    assert done.returncode == 1, "a cell timed out"
    rows = rows_of(run)
    assert sorted(row.cell_id for row in rows) == sorted(one["cell_id"] for one in cells)
    assert {row.outcome for row in rows} >= {"ok", "oom", "timed-out", "skipped"}


def test_ctrl_c_exits_130_and_leaves_a_valid_file(start: Callable, suite: Path) -> None:
    run = suite.parent / "run"
    process = start("sweep", suite, *SIMULATED, "--out", run, SHORTLLAMA_ROOFLINE=HANG)
    wait_for(lambda: has_rows(run, 2))
    time.sleep(0.3)
    family = process.children(recursive=True)
    for one in (process, *family):  # a terminal sends it to all of them
        if one.is_running():
            one.send_signal(signal.SIGINT)
    assert process.wait(20) == 130
    told = (suite.parent / "told").read_text()
    assert "--resume" in told
    assert "Traceback" not in told
    wait_for(lambda: not alive(family), 10)
    assert rows_of(run)


def test_a_full_disk_is_one_line_and_leaves_a_valid_file(run_command: Callable, suite: Path) -> None:
    run = suite.parent / "run"
    arguments = ["sweep", str(suite), *SIMULATED, "--out", str(run)]
    limited = subprocess.run(
        ["bash", "-c", 'ulimit -f 16; exec "$0" -m bench "$@"', sys.executable, *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        timeout=120,
    )
    assert limited.returncode == 2, limited.stderr
    assert limited.stderr.count("\n") == 1
    assert "File too large" in limited.stderr
    assert "--resume" in limited.stderr
    some = len(rows_of(run))
    assert some > 0
    done = run_command(*arguments, "--resume")
    assert done.returncode == 0, done.stderr
    assert len(rows_of(run)) == len(planned(run_command, suite)) > some


# -- real weights -----------------------------------------------------------------------------------------------------


def test_a_sweep_on_real_weights_prunes_evaluates_and_measures(
    run_command: Callable, grown: Path, tmp_path: Path
) -> None:
    names = [str(grown), f"{grown}/ppl:0.25", f"{grown}/mag-sp:0.25", f"{grown}/depth:9"]
    (tmp_path / "s.toml").write_text(
        'schema = "shortllama.suite/1"\n'
        f"subjects = {json.dumps(names)}\n"
        'runtimes = ["eager"]\ndtypes = ["float32"]\nbatch = [1, 4096]\noutput = [4]\nbudgets = ["48MiB"]\n'
        'cell_seconds = 0.05\nperplexity = ["self"]\n'
    )
    run = tmp_path / "run"
    done = run_command("sweep", tmp_path / "s.toml", "--device", "cpu", "--out", run, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["outcomes"] == {"oom": 4, "ok": 4}
    rows = {row.cell.subject: row for row in rows_of(run) if row.outcome == "ok"}
    assert {name: row.tokens for name, row in rows.items()} == dict.fromkeys(names, 4)
    assert rows[names[1]].parameters == rows[names[3]].parameters, "a blind plan has the shape, not the weights"
    quality = json.loads((run / "quality.json").read_bytes())
    assert quality["schema"] == "shortllama.eval/1"
    found = {name: one["perplexity"]["self"]["perplexity"] for name, one in quality["subjects"].items()}
    assert set(found) == set(names[:3]), "random weights have no perplexity worth a number"
    assert found[names[0]] < found[names[1]] < 1.2 * found[names[0]], "its pruned blocks are near redundant"
    assert len(list((run / "subjects").iterdir())) == 2


def test_a_profile_of_one_cell_writes_its_trace_and_no_rows(run_command: Callable, tmp_path: Path) -> None:
    suite = tmp_path / "mine.toml"
    suite.write_text(TOML.replace("roofline", "static").replace("float16", "float32").replace(
        '"llama-7b", "llama-7b/depth-26", "llama-7b/wanda-sp-20"', '"reference/depth:9"'
    ).replace("128, 512", "8"))  # fmt: skip
    run = tmp_path / "run"
    done = run_command("sweep", suite, "--device", "cpu", "--profile", "batch==4", "--out", run)
    assert done.returncode == 0, done.stderr
    first, *operations, last = done.stdout.splitlines()
    assert first.startswith("reference/depth:9 static float32 M4 P12 L8: prefill and last step ")
    assert any("aten::mm" in line for line in operations)
    (trace,) = (run / "profiles").iterdir()
    assert str(trace) in last
    assert trace.stat().st_size > 1000
    assert not (run / store.FILE_NAME).exists()
