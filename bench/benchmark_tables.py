"""Samples measured elsewhere, in the tables and files of pytest-benchmark: the one place that knows its private parts.

Its fixture times functions itself and offers no way to hand in samples taken in a child process. What does is private:
`_make_stats` with one iteration a round, then `update` with each duration. So the versions that this was tried with are
pinned here, and with another one nothing is handed over.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from importlib import metadata
from typing import Any

OLDEST, BEFORE = (5, 1), (6, 0)


def refusal() -> str | None:
    """Return why samples cannot be handed to the installed pytest-benchmark; None where they can."""
    try:
        version = metadata.version("pytest-benchmark")
    except metadata.PackageNotFoundError:
        return "pytest-benchmark is not installed"
    major, minor = (int(part) for part in version.split(".")[:2])
    if OLDEST <= (major, minor) < BEFORE:
        return None
    known = f"{'.'.join(map(str, OLDEST))} to before {'.'.join(map(str, BEFORE))}"
    return f"pytest-benchmark {version} is not one of those known here ({known}); its tables lack these cells"


def claim(benchmark: Any) -> bool:
    """Take the test's row for samples to come; return whether it is to be had: benchmarks are on, the row is free."""
    free = not benchmark._mode
    benchmark._mode = benchmark._mode or "bench_cell"  # where it is empty at the end, the fixture warns
    return free and not benchmark.disabled and refusal() is None


def feed(benchmark: Any, samples_s: Iterable[float], *, group: str, extra_info: Mapping[str, Any]) -> None:
    """Fill the row that was claimed with samples in seconds; a group that the test has set stays."""
    benchmark.group = benchmark.group or group
    benchmark.extra_info.update(extra_info)
    stats = benchmark._make_stats(1)
    for one in samples_s:
        stats.update(one)
