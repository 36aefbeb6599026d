"""The performance suite runs only when asked for: `pytest --benchmark-only` (or `make bench`).

`--benchmark-enable` asks too (other tests run as well), and so does `--benchmark-disable`, which runs everything once,
untimed, to see that it still works. Without one of them every test here is skipped: timing belongs neither in unit
tests nor on a busy machine.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from statistics import median
from time import perf_counter

import pytest

from bench import pytest_plugin

ASKED = ("benchmark_only", "benchmark_enable", "benchmark_disable")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if pytest_plugin.is_parallel(config):
        skip = pytest.mark.skip(reason="performance suite: off under xdist, where tests slow each other down")
    elif any(config.getoption(option) for option in ASKED):
        return
    else:
        skip = pytest.mark.skip(reason="performance suite: run pytest --benchmark-only")
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(skip)


@pytest.fixture
def timed(pytestconfig: pytest.Config) -> bool:
    """Whether times count; with --benchmark-disable everything runs once and no limit is checked."""
    return not pytestconfig.getoption("benchmark_disable")


@pytest.fixture
def interleaved(timed: bool) -> Callable[..., tuple[list[float], list[float]]]:
    """Return run(a, b, pairs) -> seconds of each, measured in turn (ABBA) in this process, so that drift hits both."""

    def run(a: Callable[[], object], b: Callable[[], object], pairs: int) -> tuple[list[float], list[float]]:
        times: tuple[list[float], list[float]] = ([], [])
        for pair in range(pairs if timed else 1):
            for which in (0, 1) if pair % 2 else (1, 0):
                start = perf_counter()
                (a, b)[which]()
                times[which].append(perf_counter() - start)
        return times

    return run


def ratio(a: list[float], b: list[float]) -> float:
    """The ratio of medians, a to b."""
    return median(a) / median(b)
