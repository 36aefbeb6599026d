"""The performance suite runs only when asked for: `pytest --benchmark-only tests/perf` (or `make bench`).

`--benchmark-enable` asks too (other tests run as well), and so does `--benchmark-disable`, which runs everything once,
untimed, to see that it still works. Without one of them every test here is skipped: timing belongs neither in unit
tests nor on a busy machine.
"""

from __future__ import annotations

from pathlib import Path

import pytest

ASKED = ("benchmark_only", "benchmark_enable", "benchmark_disable")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if any(config.getoption(option) for option in ASKED):
        return
    skip = pytest.mark.skip(reason="performance suite: run pytest --benchmark-only tests/perf")
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(skip)
