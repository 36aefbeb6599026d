"""A pytest plugin with which a project gates its own model. Opt-in by name: `pytest_plugins = ["bench.pytest_plugin"]`.

    @pytest.mark.bench(max_latency="80ms", max_memory="512MiB", baseline="runs/main", fail_over="latency:5%")
    def test_decode(bench_cell):
        bench_cell("./my-model", "static", batch=8, output=64)

`bench_cell(model, runtime, ...)` measures one cell in child processes, by the code of `shortllama sweep`, and fails the
test where a limit of its marker is broken. `memory_budget("512MiB").largest_batch(model, ...)` finds where memory ends.
`--bench-out RUN` keeps the rows as a run that every command reads, and that is a baseline later. Where pytest-benchmark
is installed, the first cell of a test is its row there, and `--benchmark-only`, `--benchmark-skip`, `--benchmark-save`
and `--benchmark-compare` hold for it; with `--benchmark-disable` cells run a few times and times are not judged.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from bench import benchmark_tables, one_cell, peaks, store, thresholds, timing
from bench.measurement import Frontier, Measurement
from bench.one_cell import Ask, Model
from bench.store import Results
from bench.thresholds import Thresholds
from bench.timing import Estimate
from shortllama.errors import ShortllamaError

MARKER = "bench"
OFF = "bench_cell is off under xdist: tests that run beside each other slow each other down; run them with -n 0"
# Enough for three calls and no more: what is looked at then is not their time.
UNTIMED_S = 1e-3
_WRITER = pytest.StashKey[store.Writer]()


class BenchCell(msgspec.Struct, frozen=True):
    """One measured cell. `row` and `results` are what a results file holds; the rest is read from them.

    Properties are None where the cell ran out of memory, or where this machine or runtime cannot tell.
    """

    row: Measurement
    results: Results

    @property
    def outcome(self) -> str:
        """`ok`, `oom`, or `unstable` where heat slowed the device down."""
        return self.row.outcome

    @property
    def latency(self) -> Estimate | None:
        """Seconds of a whole call: the median, with its 95 % interval."""
        return timing.latency(self.row)

    @property
    def throughput(self) -> Estimate | None:
        """New tokens a second, all sequences together."""
        return timing.throughput(self.row)

    @property
    def first_token(self) -> Estimate | None:
        """Seconds to the first token."""
        return timing.first_token(self.row)

    @property
    def per_token_s(self) -> float | None:
        """Median seconds of a decode step."""
        return timing.per_token(self.row)

    @property
    def peak_bytes(self) -> int | None:
        """Peak memory, weights included: of the allocator on CUDA, of the process in a pass of its own on a CPU."""
        return self.row.memory.allocated

    @property
    def ops_per_token(self) -> int | None:
        """Operations that a decode step calls."""
        counted = self.row.bounds.ops_per_token if self.row.bounds else None
        return sum(counted.values()) if counted else None

    @property
    def mbu(self) -> float | None:
        """Bytes a step must move, over its time and the measured bandwidth (0-1; beyond 1 where a cache serves it).

        None until `shortllama ceilings` has measured the bandwidth here.
        """
        known = peaks.of(self.results.environments[self.row.environment])
        if known is None or not self.per_token_s or self.row.bounds is None:
            return None
        return self.row.bounds.decode_bytes / self.per_token_s / known.read

    @property
    def utilisation(self) -> float | None:
        """Share of the device in use, where `telemetry=True` asked for it: SMs by performance counters, else NVML's
        share of busy time; on a CPU, that of the host."""
        fields = (self.row.telemetry.get(name) for name in ("gpm_sm", "nvml_busy", "host_busy"))
        return next((value for value in fields if value is not None), None)

    def facts(self) -> dict[str, Any]:
        """Return the figures by name, in SI units, as `extra_info` of pytest-benchmark holds them."""
        return {
            "tokens_per_s": _rounded(self.throughput and self.throughput.value),
            "first_token_s": _rounded(self.first_token and self.first_token.value),
            "step_s": _rounded(self.per_token_s),
            "peak_bytes": self.peak_bytes,
            "ops_per_token": self.ops_per_token,
            "mbu": _rounded(self.mbu),
            "utilisation": _rounded(self.utilisation),
            "outcome": self.outcome,
            "stop": self.row.stop,
            "cell": self.row.cell.label,
        }


def _rounded(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.5g}")


class Bench:
    """What the fixture `bench_cell` is: call it to measure a cell."""

    def __init__(self, request: pytest.FixtureRequest, benchmark: Any) -> None:
        self._request, self._benchmark = request, benchmark
        marker = request.node.get_closest_marker(MARKER)
        self._limits = thresholds.read(marker.kwargs) if marker else Thresholds()

    @property
    def timed(self) -> bool:
        """Whether times count; not with --benchmark-disable."""
        return self._benchmark is None or not self._benchmark.disabled

    def __call__(
        self, model: Model, runtime: str = "static", *, name: str | None = None, group: str | None = None, **how: Any
    ) -> BenchCell:
        """Measure one cell; `how` are the other fields of `bench.one_cell.Ask` (batch, prompt, output, budget, ...).

        `name`: the subject's, where `model` is in memory or a shape (by default the test's). Fails the test where a
        limit is broken and where nothing could be measured; out of memory is an outcome, unless limits are set.
        """
        shown = self._benchmark is not None and benchmark_tables.claim(self._benchmark)
        ask = _ask(runtime, how)
        if not self.timed:
            ask = msgspec.structs.replace(ask, seconds=UNTIMED_S, telemetry=False)
        results = _or_fail(one_cell.measure, model, ask, name or self._request.node.name)
        cell = BenchCell(one_cell.the_row(results), results)
        self._keep(results)
        if cell.row.outcome in ("failed", "timed-out", "skipped"):
            pytest.fail(f"{cell.row.cell.label}: {cell.row.outcome}: {cell.row.reason}", pytrace=False)
        if shown and cell.row.samples.call_s:
            self._show(cell, group)
        self._judge(cell)
        return cell

    def _show(self, cell: BenchCell, group: str | None) -> None:
        where = cell.row.cell
        group = group or f"{where.runtime} {where.dtype} M{where.batch} P{where.prompt} L{where.output}"
        benchmark_tables.feed(self._benchmark, cell.row.samples.call_s, group=group, extra_info=cell.facts())

    def _keep(self, results: Results) -> None:
        writer = self._request.config.stash.get(_WRITER, None)
        if writer is not None:
            for row in (*results.environments.values(), *results.measurements):
                writer.write(row)

    def _judge(self, cell: BenchCell) -> None:
        limits = self._limits
        found = thresholds.broken(cell.row, limits, timed=self.timed)
        if limits.baseline is not None:
            base = _or_fail(store.read, self._request.config.rootpath / limits.baseline)
            found += thresholds.regressed(cell.results, base, limits, timed=self.timed)
        if found:
            pytest.fail("\n".join(f"{cell.row.cell.label}: {one}" for one in found), pytrace=False)


class MemoryBudget(msgspec.Struct, frozen=True):
    """A memory budget, kept by child processes: a data limit on a CPU, ballast or the allocator's share on CUDA."""

    budget: str
    name: str

    def largest_batch(self, model: Model, runtime: str = "static", **how: Any) -> int:
        """Return the largest batch that fits, each side of it tried twice in fresh processes; 0 where none does."""
        found = self.search(model, runtime, **how).largest_batch
        assert found is not None
        return found

    def search(self, model: Model, runtime: str = "static", *, name: str | None = None, **how: Any) -> Frontier:
        """Return the whole row of that search; fails the test where it could not be ended."""
        for word in ("batch", "budget", "seconds", "telemetry"):
            if word in how:
                pytest.fail(
                    f"largest_batch takes no {word}: it finds the batch under memory_budget(...)", pytrace=False
                )
        found = _or_fail(
            one_cell.largest_batch, model, _ask(runtime, {**how, "budget": self.budget}), name or self.name
        )
        if found.largest_batch is None:
            pytest.fail(f"{self.budget}: no largest batch: {found.reason}", pytrace=False)
        return found


def _ask(runtime: str, how: dict[str, Any]) -> Ask:
    unknown = [name for name in how if name not in Ask.__struct_fields__]
    if unknown:
        pytest.fail(
            f"{unknown[0]} is no property of a cell; there are {', '.join(Ask.__struct_fields__)}", pytrace=False
        )
    return Ask(runtime=runtime, **how)


def _or_fail(work: Any, *arguments: Any) -> Any:
    """Call `work`; an expected error fails the test with its sentence, without a traceback."""
    try:
        return work(*arguments)
    except ShortllamaError as error:
        failure = str(error)
    return pytest.fail(failure, pytrace=False)


# -- fixtures ----------------------------------------------------------------------------------------------------------


def _bench(request: pytest.FixtureRequest, benchmark: Any) -> Bench:
    if is_parallel(request.config):
        pytest.skip(OFF)
    return Bench(request, benchmark)


class _Alone:
    """The fixture where there is no pytest-benchmark."""

    @pytest.fixture
    def bench_cell(self, request: pytest.FixtureRequest) -> Bench:
        """Measure one cell of a model: bench_cell(model, runtime, batch=..., prompt=..., output=...)."""
        return _bench(request, None)


class _WithTables:
    """The fixture where there is: it asks for `benchmark`, so that --benchmark-only and -skip know its tests."""

    @pytest.fixture
    def bench_cell(self, request: pytest.FixtureRequest, benchmark: Any) -> Bench:
        """Measure one cell of a model: bench_cell(model, runtime, batch=..., prompt=..., output=...)."""
        return _bench(request, benchmark)


@pytest.fixture
def memory_budget(request: pytest.FixtureRequest) -> Any:
    """Find where memory ends: memory_budget("512MiB").largest_batch(model, runtime, prompt=..., output=...)."""
    return lambda budget: MemoryBudget(budget, request.node.name)


# -- pytest's hooks ----------------------------------------------------------------------------------------------------


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add --bench-out."""
    group = parser.getgroup("bench", "measuring models")
    group.addoption("--bench-out", metavar="RUN", help="keep the rows of bench_cell in this new folder")


def pytest_configure(config: pytest.Config) -> None:
    """Declare the marker, choose the fixture, open the run."""
    words = ", ".join(f"{name}=..." for name in Thresholds.__struct_fields__)
    config.addinivalue_line("markers", f"{MARKER}({words}): limits for what bench_cell measures in the test")
    config.pluginmanager.register(_WithTables() if config.pluginmanager.hasplugin("benchmark") else _Alone())
    out = config.getoption("bench_out")
    if out and not is_parallel(config):
        config.stash[_WRITER] = _opened(Path(out))


def _opened(folder: Path) -> store.Writer:
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise pytest.UsageError(f"--bench-out {folder}: is there already; remove it, or give another folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return store.Writer(folder)
    except (OSError, ShortllamaError) as error:
        raise pytest.UsageError(f"--bench-out {folder}: cannot be written ({error})") from None


def pytest_unconfigure(config: pytest.Config) -> None:
    """Close the run; leave no folder in which nothing was measured."""
    writer = config.stash.get(_WRITER, None)
    if writer is None:
        return
    writer.close()
    if writer.path.stat().st_size == 0:
        writer.path.unlink()
        writer.path.parent.rmdir()


def is_parallel(config: pytest.Config) -> bool:
    """Return whether pytest-xdist spreads the tests over processes."""
    is_worker = hasattr(config, "workerinput") or "PYTEST_XDIST_WORKER" in os.environ
    return is_worker or config.getoption("dist", "no") != "no"


def pytest_report_header(config: pytest.Config) -> Iterator[str]:
    """Say what is off, and why."""
    if is_parallel(config):
        yield OFF
    if config.pluginmanager.hasplugin("benchmark") and (why := benchmark_tables.refusal()):
        yield f"bench: {why}"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Refuse a marker that cannot be read, and one on a test that measures nothing: it would never fail."""
    for item in items:
        marker = item.get_closest_marker(MARKER)
        if marker is None:
            continue
        if marker.args:
            raise pytest.UsageError(f"{item.nodeid}: the bench marker takes keywords only, as max_latency=...")
        try:
            thresholds.read(marker.kwargs)
        except ShortllamaError as error:
            raise pytest.UsageError(f"{item.nodeid}: bench marker: {error}") from None
        if "bench_cell" not in getattr(item, "fixturenames", ()):
            raise pytest.UsageError(f"{item.nodeid}: has a bench marker and never asks for bench_cell; add it")
