"""Commands that only plan or read answer at once: whole processes, from the shell's point of view."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest
import typer

from bench import store
from bench.cells import Cell
from bench.cli import app
from bench.measurement import Measurement, Memory, Samples, SessionId, environment
from shortllama import blind, catalogue
from shortllama.plans import write_plan

ROOT = Path(__file__).parents[2]
START_UP_S = 0.5
DRY_RUN_S = 1.0
READ_S = 5.0
COMPARE_S = 5.0

SUITE = """schema = "shortllama.suite/1"
subjects = ["llama-7b/depth:13..32"]
runtimes = ["eager", "static"]
dtypes = ["float16", "bfloat16"]
batch = [{batches}]
prompt = [12, 128]
output = [128]
"""


def commands() -> list[str]:
    group: Any = typer.main.get_command(app)
    return sorted(group.commands)


def rows(count: int) -> list[Measurement]:
    """Rows of the usual size (20 repeats, 127 steps: some 2 KiB)."""
    samples = Samples((1.234567,) * 20, (0.0123456,) * 20, (0.0098765,) * 127)
    memory = Memory(analytic=13_000_000_000, allocated=13_100_000_000, reserved=13_200_000_000)
    cells = [Cell("llama-7b", "static", "float16", "sdpa", 12, 128, "none", index + 1) for index in range(count)]
    where = environment({"device": "test"}, {}).id
    return [
        Measurement(
            cell, cell.id, where, "ok", False, SessionId("s"), samples=samples, memory=memory, tokens=cell.batch * 128
        )
        for cell in cells
    ]


def write_run(folder: Path, count: int) -> None:
    """Write rows without the store's flush to disk after each, which is not what is measured here."""
    folder.mkdir()
    lines = [store.encode(row) for row in (environment({"device": "test"}, {}), *rows(count))]
    (folder / "measurements.jsonl").write_bytes(b"".join(lines))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a plan, two runs of 100 rows, and suites of 80 and of 10,000 cells."""
    folder = tmp_path_factory.mktemp("place")
    shape = catalogue.lookup("llama-7b")
    write_plan(folder / "plan.json", blind.parse("flap:26.9±7.5x8577±2078", model="llama-7b", shape=shape))
    for name in ("base", "head"):
        write_run(folder / name, 100)
    subjects, others = 20, 2 * 2 * 2
    for name, cells in (("small", 1), ("large", 10_000 // subjects // others + 1)):
        (folder / f"{name}.toml").write_text(SUITE.format(batches=", ".join(str(n + 1) for n in range(cells))))
    return folder


@pytest.fixture
def start(benchmark, place: Path):
    """Return start(*arguments, rounds) -> stdout, timing whole processes that must end well."""

    def start(*arguments: str, rounds: int = 7) -> bytes:
        def once() -> bytes:
            done = subprocess.run(
                [sys.executable, "-m", "bench", *arguments],
                capture_output=True,
                check=True,
                cwd=place,
                env={**os.environ, "PYTHONPATH": str(ROOT)},
            )
            return done.stdout

        return benchmark.pedantic(once, rounds=rounds, warmup_rounds=1)

    return start


def middle(benchmark) -> float:
    """The median of the rounds in seconds, 0 where nothing was timed (--benchmark-disable)."""
    return benchmark.stats.stats.median if benchmark.stats else 0.0


@pytest.mark.parametrize("command", ["", *commands()])
def test_help(start, benchmark, command: str):
    benchmark.group = "start-up: --help"
    start(*filter(None, [command]), "--help", rounds=5)
    assert middle(benchmark) < START_UP_S


@pytest.mark.parametrize(
    "command", ["sweep small.toml --dry-run", "show plan.json", "shapes llama-7b", "compare base head"]
)
def test_planning_and_reading(start, benchmark, command: str):
    benchmark.group = "start-up: whole command"
    start(*command.split())
    assert middle(benchmark) < START_UP_S


def test_dry_run_of_ten_thousand_cells(start, benchmark):
    benchmark.group = "many cells"
    cells = msgspec.json.decode(start("sweep", "large.toml", "--dry-run", "--json", rounds=5))["cells"]
    benchmark.extra_info["cells"] = len(cells)
    assert len(cells) >= 10_000
    assert middle(benchmark) < DRY_RUN_S


def test_comparing_ten_thousand_cells(start, benchmark, place: Path, timed: bool):
    """Start-up, reading, verdicts and every form of output."""
    benchmark.group = "many cells"
    count = 10_000 if timed else 100
    for name in ("many-base", "many-head"):
        write_run(place / name, count)
    outputs = ("--markdown", "m.md", "--junit", "j.xml", "--github", "--json")
    found = msgspec.json.decode(start("compare", "many-base", "many-head", *outputs, rounds=3))
    assert found["comparison"]["cells"] == count
    assert middle(benchmark) < COMPARE_S


def test_reading_a_hundred_thousand_rows(benchmark, tmp_path: Path, timed: bool):
    benchmark.group = "many cells"
    count = 100_000 if timed else 1_000
    write_run(tmp_path / "run", count)
    found = benchmark.pedantic(store.read, args=(tmp_path / "run",), rounds=3)
    benchmark.extra_info["bytes_a_row"] = (tmp_path / "run" / "measurements.jsonl").stat().st_size // count
    assert len(found.measurements) == count
    assert middle(benchmark) < READ_S
