"""The pytest plugin in somebody else's project, measured on a simulated device: exact, and it takes no time."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import msgspec
import pytest

from bench import store, thresholds
from bench.cells import Cell
from bench.measurement import Bounds, Measurement, Memory, Samples, SessionId
from shortllama.errors import InputError

ROOT = Path(__file__).parents[1]
HOW = 'device="h100", output=16'


@pytest.fixture
def project(tmp_path: Path):
    """Return run(test file's text, *options) -> the finished pytest of a project that has opted in."""
    (tmp_path / "conftest.py").write_text('pytest_plugins = ["bench.pytest_plugin"]\n')

    def run(text: str, *options: str, **variables: str) -> subprocess.CompletedProcess[str]:
        (tmp_path / "test_speed.py").write_text("import pytest\n\n" + textwrap.dedent(text))
        command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-W", "error", *options]
        return subprocess.run(
            command, cwd=tmp_path, capture_output=True, text=True, timeout=300,
            env={**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "200", **variables},
        )  # fmt: skip

    return run


def gated(marker: str, subject: str = "llama-7b") -> str:
    return f"""
    @pytest.mark.bench({marker})
    def test_decode(bench_cell):
        cell = bench_cell("{subject}", "roofline", {HOW})
        assert cell.outcome == "ok" and cell.latency.value > 0 and cell.throughput.value > 0
        assert cell.peak_bytes > 1e10 and cell.per_token_s > 0
    """


def test_limits_that_hold_pass(project):
    done = project(gated('max_latency="10s", min_throughput=1, max_memory="16GiB"'))
    assert done.returncode == 0, done.stdout


BROKEN = {
    'max_latency="1ms"': r"latency \S+ m?s .*interval.* is over max_latency 1.00 ms; .*shortllama ab",
    "min_throughput=1e9": r"throughput .* tokens/s is under min_throughput 1,000,000,000 tokens/s",
    'max_memory="1GiB"': r"peak memory \S+ GiB is over max_memory 1.00 GiB.*shortllama oom",
    "max_ops=10": r"runtime roofline calls no operations that can be counted",
    'baseline="nowhere", fail_over="latency:5%"': r"nowhere",
}


def test_a_broken_limit_fails_in_one_sentence(project):
    tests = [textwrap.dedent(gated(marker)).replace("test_decode", f"test_{n}") for n, marker in enumerate(BROKEN)]
    done = project("\n".join(tests))
    assert done.returncode == 1
    assert f"{len(BROKEN)} failed" in done.stdout, done.stdout
    for words in BROKEN.values():
        assert re.search(words, done.stdout.replace("\xa0", " ")), (words, done.stdout)
    assert "Traceback" not in done.stdout


def test_a_baseline_decides(project, tmp_path: Path):
    assert project(gated(""), "--bench-out", "base").returncode == 0
    (row,) = store.read(tmp_path / "base").measurements
    assert row.simulated
    assert project(gated('baseline="base", fail_over="latency:5%"')).returncode == 0
    # A slowdown is planted as a baseline that was faster.
    lines = (tmp_path / "base" / store.FILE_NAME).read_bytes().splitlines()
    rows = [msgspec.json.decode(line) for line in lines]
    for one in rows:
        if one["kind"] == "measurement":
            one["samples"]["call_s"] = [value / 1.1 for value in one["samples"]["call_s"]]
    (tmp_path / "base" / store.FILE_NAME).write_bytes(b"\n".join(map(msgspec.json.encode, rows)) + b"\n")
    done = project(gated('baseline="base", fail_over="latency:5%"'))
    assert done.returncode == 1
    assert re.search(r"latency .* in baseline base, now .*1\.10", done.stdout), done.stdout
    assert project(gated('baseline="base", fail_over="latency:15%"')).returncode == 0


def test_a_baseline_without_the_cell_fails(project):
    assert project(gated(""), "--bench-out", "base").returncode == 0
    done = project(gated('baseline="base", fail_over="latency:5%"', subject="llama-7b/depth-26"))
    assert done.returncode == 1
    assert "has no row of this cell" in done.stdout


def test_memory_budget(project):
    done = project(f"""
    def test_room(memory_budget, bench_cell):
        largest = memory_budget("16GiB").largest_batch("llama-7b", "roofline", {HOW})
        assert bench_cell("llama-7b", "roofline", batch=largest, budget="16GiB", {HOW}).outcome == "ok"
        assert bench_cell("llama-7b", "roofline", batch=largest + 1, budget="16GiB", {HOW}).outcome == "oom"

    def test_wrong(memory_budget):
        memory_budget("16 apples").largest_batch("llama-7b", "roofline", {HOW})
    """)
    assert "1 failed, 1 passed" in done.stdout, done.stdout
    assert "'16 apples' is not a size" in done.stdout


@pytest.mark.parametrize(
    ("marker", "words"),
    [("max_latencies=1", "max_latencies is no limit; there are max_latency"), ("0.05", "takes keywords only")],
)
def test_a_marker_that_cannot_be_read_ends_the_collection(project, marker: str, words: str):
    done = project(gated(marker))
    assert done.returncode == 4
    assert words in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"max_latency": "1 hour"}, "max_latency='1 hour' is not seconds, or for example \"50ms\""),
        ({"max_latency": -1}, "max_latency=-1 is not seconds"),
        ({"max_ops": True}, "max_ops=True is not a number above 0"),
        ({"max_memory": "none"}, "is no limit; leave it out"),
        ({"max_memory": "much"}, "is not a size"),
        ({"fail_over": "latency:5%"}, "give baseline=RUN too"),
        ({"baseline": "base", "fail_over": "speed:5%"}, "speed"),
    ],
)
def test_limits_that_cannot_be_read(given, words: str):
    with pytest.raises(InputError, match=re.escape(words)):
        thresholds.read(given)


def test_a_marker_that_could_never_fail_is_refused(project):
    done = project("@pytest.mark.bench(max_latency=1)\ndef test_nothing():\n    pass")
    assert done.returncode == 4
    assert "never asks for bench_cell" in done.stderr


REFUSED = {
    '"llama-7b", "static", device="h100"': "device h100 is simulated and runtime static needs a real one",
    '"llama-8b", "roofline", device="h100"': "llama-8b",
    'object(), "static", device="cpu"': "not a name, a folder, a shape or a transformers model",
    '"llama-7b", "roofline", batches=3': "batches is no property of a cell; there are runtime, batch",
    '"llama-7b", "roofline", batch=0, device="h100"': "batch 0 is not a number of 1 or more",
    '"llama-7b", "fast", device="cpu"': "unknown runtime 'fast'",
}


def test_a_cell_that_cannot_be_measured_fails_in_one_sentence(project):
    done = project("\n".join(f"def test_{n}(bench_cell):\n    bench_cell({call})" for n, call in enumerate(REFUSED)))
    assert f"{len(REFUSED)} failed" in done.stdout, done.stdout
    for words in REFUSED.values():
        assert words in done.stdout
    assert "Traceback" not in done.stdout


def test_a_run_that_exists_is_not_overwritten(project, tmp_path: Path):
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "notes.txt").write_text("mine")
    done = project(gated(""), "--bench-out", "base")
    assert done.returncode == 4
    assert "is there already" in done.stderr
    assert project("def test_nothing():\n    pass", "--bench-out", "fresh").returncode == 0
    assert not (tmp_path / "fresh").exists()


def test_save_compare_and_fail(project, tmp_path: Path):
    saved = ("--benchmark-only", "--benchmark-storage", "saved")
    text = textwrap.dedent(gated("")) + "\ndef test_other():\n    raise AssertionError\n"
    assert project(text, *saved, "--benchmark-save", "first").returncode == 0
    (file,) = (tmp_path / "saved").rglob("*_first.json")
    document = json.loads(file.read_bytes())
    (one,) = document["benchmarks"]
    assert one["group"] == "roofline float16 M1 P12 L16"
    assert one["stats"]["rounds"] >= 3
    assert one["extra_info"]["tokens_per_s"] == pytest.approx(16 / one["stats"]["median"], rel=1e-3)
    assert one["extra_info"]["mbu"] is None
    compared = project(text, *saved, "--benchmark-compare", "--benchmark-compare-fail", "median:5%")
    assert compared.returncode == 0, compared.stdout
    for key in ("min", "max", "mean", "median"):
        one["stats"][key] /= 1.2
    file.write_text(json.dumps(document))
    slower = project(text, *saved, "--benchmark-compare", "--benchmark-compare-fail", "median:5%")
    assert slower.returncode != 0
    assert "Performance has regressed" in slower.stdout + slower.stderr


def test_untimed_runs_judge_no_times(project):
    assert project(gated('max_latency="1ms"'), "--benchmark-disable").returncode == 0
    assert project(gated('max_memory="1GiB"'), "--benchmark-disable").returncode == 1


def test_without_pytest_benchmark(project):
    assert project(gated('max_latency="10s"'), "-p", "no:benchmark").returncode == 0
    assert project(gated('max_latency="1ms"'), "-p", "no:benchmark").returncode == 1


def test_under_xdist_it_says_in_one_line_that_it_is_off(project):
    done = project(gated('max_latency="1ms"'), "-p", "no:benchmark", "-rs", PYTEST_XDIST_WORKER="gw0")
    assert done.returncode == 0
    assert "1 skipped" in done.stdout
    assert done.stdout.count("bench_cell is off under xdist") == 2  # as the header, as the reason


def test_a_model_in_memory_is_measured_here(project, tmp_path: Path):
    """A width-pruned model whose blocks differ, so that no stock config could describe it."""
    done = project(
        """
        import shortllama as sl
        from shortllama import blind, surgery
        from shortllama.shape import ModelShape

        SIZES = dict(vocabulary=97, hidden=64, head_dim=8, blocks=4, query_heads=8, kv_heads=4, neurons=96)
        SHAPE = ModelShape.uniform(**SIZES)

        @pytest.mark.bench(max_ops=1000, max_memory="64MiB")
        def test_mine(bench_cell):
            model = surgery.build(SHAPE)
            pruned = sl.apply(blind.parse("width:2x48@1-2", model="m", shape=SHAPE), model)
            cell = bench_cell(pruned, "eager", output=4, seconds=0.01, device="cpu")
            assert cell.row.parameters == sum(p.numel() for p in pruned.parameters())
            assert cell.ops_per_token > 50 and cell.row.cell.subject == "test_mine"
        """,
        "--bench-out", "run",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    (row,) = store.read(tmp_path / "run").measurements
    assert row.outcome == "ok"


def test_the_example_of_the_readme(project):
    (example,) = [
        block for block in re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.M | re.S)
        if "bench_cell" in block
    ]  # fmt: skip
    assert 'pytest_plugins = ["bench.pytest_plugin"]' in example
    done = project(example, "--benchmark-disable")
    assert done.returncode == 0, done.stdout
    assert "1 passed" in done.stdout
    strict = example.replace("max_ops=2000", "max_ops=100")
    failed = project(strict, "--benchmark-disable")
    assert failed.returncode == 1
    assert "operations a token are over max_ops 100 (most: " in failed.stdout


# -- the decisions -----------------------------------------------------------------------------------------------------


def row(calls: tuple[float, ...] = (1.0,) * 10, **fields) -> Measurement:
    cell = Cell("m", "eager", "float32", "sdpa", 1, 10, "none", 1)
    return Measurement(
        cell, cell.id, "e", fields.pop("outcome", "ok"), False, SessionId("s"), samples=Samples(calls), **fields
    )


def test_a_time_breaks_its_limit_with_its_whole_interval():
    noisy = tuple(1 + 0.02 * (place - 5) for place in range(11))  # the median is 1, its interval begins below 0.95
    limits = thresholds.read({"max_latency": 0.95, "min_throughput": 10.2})
    assert thresholds.broken(row(noisy), limits) == []
    assert len(thresholds.broken(row(), limits)) == 2
    assert thresholds.broken(row(), limits, timed=False) == []
    assert len(thresholds.broken(row((1.0,)), limits)) == 2


def test_exact_limits_hold_to_the_last_unit():
    bounds = Bounds(1, 1, ops_per_token={"mm": 7, "add": 3})
    one = row(bounds=bounds, memory=Memory(allocated=1 << 20))
    assert thresholds.broken(one, thresholds.read({"max_ops": 10, "max_memory": "1MiB"})) == []
    first, second = thresholds.broken(one, thresholds.read({"max_ops": 9, "max_memory": (1 << 20) - 1}))
    assert "peak memory" in first
    assert "mm 7, add 3" in second


def test_what_was_not_measured_meets_no_limit():
    limits = thresholds.read({"max_latency": "2s", "max_memory": "1GiB"})
    (said,) = thresholds.broken(row((), outcome="oom", reason="no room"), limits)
    assert said == "oom (no room); max_latency, max_memory cannot be met"
    (said,) = thresholds.broken(row(memory=Memory(reasons={"allocated": "refused"})), limits)
    assert "not known (refused)" in said
    assert thresholds.broken(row((), outcome="oom"), thresholds.read({})) == []


@pytest.mark.parametrize(
    ("value", "seconds"), [("50ms", 0.05), ("1.5 s", 1.5), ("7us", 7e-6), ("7µs", 7e-6), (2, 2), (0.25, 0.25)]
)
def test_times_are_read(value, seconds):
    assert thresholds.read({"max_latency": value}).max_latency == pytest.approx(seconds)


@pytest.mark.parametrize("value", ["5", "ms", "-5ms", 0, float("nan"), float("inf"), None, True])
def test_what_is_no_time_is_refused(value):
    with pytest.raises(InputError, match="max_latency"):
        thresholds.read({"max_latency": value})
