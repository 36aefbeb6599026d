"""A search for the largest batch costs less than three full cells there, process starts and loading left out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from bench import store

CELLS = 3
SUITE = """schema = "shortllama.suite/1"
subjects = ["reference/depth:9"]
runtimes = ["static"]
dtypes = ["float32"]
batch = [{batch}]
prompt = [16]
output = [24]
budgets = ["48MiB"]
"""


def test_a_search_costs_less_than_three_cells(benchmark, timed: bool, run_command: Callable, tmp_path: Path) -> None:
    """Seconds of all trials against those of the cell that holds the answer, at the suite's usual length."""
    benchmark.group = "search"
    path = tmp_path / "suite.toml"

    def run(verb: str, batch: int) -> store.Results:
        path.write_text(SUITE.format(batch=batch))
        done = run_command(verb, path, "--device", "cpu", "--out", tmp_path / verb, OMP_NUM_THREADS="1")
        assert done.returncode == 0, done.stderr
        return store.read(tmp_path / verb)

    def search_and_cell() -> tuple[float, float, float]:
        (end,) = run("oom", 1).frontiers
        assert end.confirmed
        assert end.largest_batch
        (row,) = run("sweep", end.largest_batch).measurements
        assert row.outcome == "ok"
        return end.trial_s or 0.0, end.start_s or 0.0, row.wall_s or 0.0

    trial_s, start_s, cell_s = benchmark.pedantic(search_and_cell, rounds=1)
    benchmark.extra_info |= {"cells": round(trial_s / cell_s, 3), "starting_s": start_s}
    if timed:
        assert 0 < trial_s < CELLS * cell_s
