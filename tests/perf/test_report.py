"""Building a report: figures, tables and pages of a run of some hundred cells."""

from __future__ import annotations

import time
from pathlib import Path

import report_cases

from bench import store
from bench.report import publish

BATCHES = tuple(1 << power for power in range(8))


def test_a_report_of_a_run(benchmark, tmp_path: Path):
    benchmark.group = "report: build and draw"
    results = report_cases.sweep(report_cases.QUICK, {"eager": 1.0, "static": 0.7, "compile": 0.5}, BATCHES)
    run, out = tmp_path / "run", tmp_path / "report"
    run.mkdir()
    rows = (*results.environments.values(), *results.measurements)
    (run / store.FILE_NAME).write_bytes(b"".join(map(store.encode, rows)))
    benchmark.extra_info["cells"] = len(results.measurements)
    benchmark.pedantic(publish.write, args=([run], out), rounds=3, warmup_rounds=1)
    assert (out / publish.MARK).stat().st_size > 10_000


def test_a_report_of_a_hundred_thousand_cells(benchmark, request, tmp_path: Path):
    """The page stays small enough to send, and time grows with the cells, no faster."""
    benchmark.group = "report: many cells"
    timed = not request.config.getoption("--benchmark-disable")
    runtimes = {"eager": 1.0, "static": 0.7, "compile": 0.5, "paper": 1.2, "cudagraph": 0.3}
    spent: dict[int, float] = {}

    def report(count: int, name: str) -> Path:
        plans = {f"m/ppl:0.{i:03d}": (40, 1e9 - 1e6 * i, 10**9 - 10**6 * i) for i in range(count // 200)}
        cells = report_cases.sweep(
            {"m": (40, 1.1e9, 11 * 10**8), **plans}, runtimes, tuple(range(1, 21)), limit=1e18, budget="none",
            outputs=(32, 128),
        )  # fmt: skip
        run = tmp_path / f"run-{name}"
        run.mkdir()
        rows = (*cells.environments.values(), *cells.measurements)
        (run / store.FILE_NAME).write_bytes(b"".join(map(store.encode, rows)))
        start = time.process_time()
        publish.write([run], tmp_path / name)
        spent[len(cells.measurements)] = time.process_time() - start
        return tmp_path / name / publish.MARK

    report(10_000 if timed else 400, "few")
    page = benchmark.pedantic(report, args=(100_000 if timed else 1_000, "many"), rounds=1)
    (few, first), (many, second) = sorted(spent.items())
    benchmark.extra_info["cells"] = many
    assert page.stat().st_size < 25e6
    if timed:
        assert second / first < 1.5 * many / few
