"""Writes a torch trace of a cell's prefill and its last step, and says where their time went.

The last step is the longest of a cell: its cache is full. What is profiled runs slower than what is measured, so
these times explain a row and never stand in one.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from torch.profiler import ProfilerActivity, profile

from bench.jobs import Finished, Job, Measure, Profile
from bench.runtimes.protocol import Session

WARM_UPS = 2
SHOWN = 12


def open_pass(job: Job) -> Measure:
    """Return what profiles a prepared cell into the job's folder."""
    return _profile


def _profile(job: Job, session: Session) -> Finished:
    assert job.folder is not None
    cuda = job.options.device != "cpu"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    for _ in range(WARM_UPS):
        session.probe()
    with profile(activities=activities) as traced:
        start = session.clock()
        session.probe()  # waits for the device before it returns
        wall_s = session.clock() - start
    (cell,) = job.cells
    path = Path(job.folder) / f"{cell.id}.json.gz"
    half = path.with_name(f".{path.name}.tmp.json.gz")
    traced.export_chrome_trace(str(half))
    os.replace(half, path)
    averages: Any = traced.key_averages()
    kernel_s = sum(one.self_device_time_total for one in averages) / 1e6 if cuda else None
    return Finished(0, 0.0, profile=Profile(str(path), wall_s, kernel_s, _longest(averages, cuda)))


def _longest(averages: Any, cuda: bool) -> tuple[tuple[str, int, float], ...]:
    """The operations that took longest themselves: name, calls, seconds (on CUDA, of the device)."""
    times = [
        (str(one.key), int(one.count), (one.self_device_time_total if cuda else one.self_cpu_time_total) / 1e6)
        for one in averages
    ]
    return tuple(sorted(times, key=lambda one: -one[2])[:SHOWN])
