"""Building a report: figures, tables and pages of a run of some hundred cells."""

from __future__ import annotations

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
