"""One file a pass: what a child does with each cell of a job.

Each exports `open_pass(job) -> Measure`, which sets the process up before the subject is loaded. Importing this package
imports none of them.
"""

from __future__ import annotations

from importlib import import_module

from bench.jobs import Job, Measure, Purpose

MODULES: dict[Purpose, str] = {
    "measure": "bench.passes.measure",
    "probe": "bench.passes.probe",
    "certify": "bench.passes.probe",
    "profile": "bench.passes.profile",
}


def open_pass(job: Job) -> Measure:
    """Set this process up for a job; return what to do with each of its cells."""
    return import_module(MODULES[job.purpose]).open_pass(job)
