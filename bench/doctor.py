"""The verb `doctor`: is this machine fit to be measured on, and how much does equal code differ here? Torch-free.

It changes no setting. What it knows is gathered by `vitals`; what follows is decided by `diagnosis`. With --aa it runs
the gate on identical code, and keeps the machine's noise, which later comparisons of single sessions allow for.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Annotated

import msgspec
import typer

from bench import ab, diagnosis, noise, sides, store, vitals
from bench.ceilings import real
from bench.cells import Suite
from bench.comparison import Comparison
from bench.diagnosis import Finding
from bench.environment import Machine
from bench.metrics import LATENCY
from bench.noise import Noise
from bench.report import quantities
from bench.sequential import Looks
from shortllama import console
from shortllama.errors import InputError

# The least that is still a session: one cell of the shipped model, a few seconds beside the start of its process.
SUITE = Suite(
    "shortllama.suite/1", ("reference",), runtimes=("eager",), dtypes=("float32",), output=(16,), cell_seconds=2.0
)  # fmt: skip
LEAST_PAIRS, MOST_PAIRS = 2, 99


class Selftest(msgspec.Struct, frozen=True):
    """What the gate said of identical code, and the noise that was kept for this environment."""

    verdict: str
    ratio: float | None
    low: float | None
    high: float | None
    pairs: int
    noise: Noise
    allowance: float
    kept: str


def doctor(
    device: Annotated[
        str | None, typer.Option(metavar="cpu|cuda:N", help="What to examine. Default: CUDA if there is one.")
    ] = None,
    aa: Annotated[
        int | None,
        typer.Option("--aa", metavar="N", help="Compare identical code in N pairs of sessions; keep the noise."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")] = False,
) -> None:
    """Say what on this machine would spoil measurements: what was seen, why, and what to try. Changes no setting.

    --aa N takes about half a minute a pair. What identical code differs by is kept for this machine and these
    libraries: `compare` then knows how much two single sessions may differ.
    """
    if aa is not None and not LEAST_PAIRS <= aa <= MOST_PAIRS:
        raise InputError(f"--aa {aa}: give {LEAST_PAIRS} to {MOST_PAIRS} pairs of sessions")
    machine = real(device)
    findings = diagnosis.examine(vitals.gather(machine))
    tested = None if aa is None else selftest(machine, aa)
    if as_json:
        console.emit({"device": machine.name, "findings": findings, "selftest": tested})
        return
    said = [f"{machine.name}:", *(line for one in findings for line in lines(one))]
    said += [_selftest(tested)] if tested else []
    sys.stdout.write("\n".join(said) + "\n")


def selftest(machine: Machine, pairs: int) -> Selftest:
    """Run the gate on the running code against itself; keep and return the noise. Raises what sessions refuse."""
    here = sides.Side("this code", tree=sides.HERE)
    with tempfile.TemporaryDirectory(prefix="shortllama-aa-") as folder:
        asked = ab.Asked(SUITE, looks=Looks(pairs, pairs), device=machine.place)
        found = ab.measure(here, here, asked, Path(folder))
        runs = [store.read(Path(folder) / side) for side in ("base", "head")]
    (environment,) = {row.environment for run in runs for row in run.measurements}
    measured = noise.session_noise(row for run in runs for row in run.measurements)
    return told(found, measured, str(noise.remember(environment, measured)))


def told(found: Comparison, measured: Noise, kept: str) -> Selftest:
    """Return what a comparison of identical code says."""
    (one,) = [change.decision for change in found.changes if change.metric == LATENCY.name]
    return Selftest(one.verdict, one.ratio, one.low, one.high, one.pairs, measured, measured.allowance, kept)


# -- words ------------------------------------------------------------------------------------------------------------

_MARKS = {"fine": "ok", "trouble": "!!", "unknown": "??"}


def lines(one: Finding) -> list[str]:
    """Return a finding for people: what was seen, and where it is trouble the cause and what to try."""
    said = [f"  {_MARKS[one.state]} {one.check}: {one.seen}"]
    said += [f"     {one.cause}"] if one.cause else []
    said += [f"     try: {one.remedy}"] if one.remedy else []
    return said


def _selftest(one: Selftest) -> str:
    between, within = (f"{value:.2%}" for value in (one.noise.between, one.noise.within))
    wrong = ", a false alarm" if one.verdict in ("regressed", "improved") else ""
    ends = "" if one.low is None or one.high is None else f" (95 % interval {one.low:.3f} to {one.high:.3f})"
    ratio = quantities.MISSING if one.ratio is None else f"{one.ratio:.3f}"
    return (
        f"identical code, {one.pairs} pairs: {one.verdict}{wrong}; ratio {ratio}{ends}\n"
        f"noise: {between} between sessions, {within} within one; two single sessions of equal code differ by at most "
        f"{one.allowance:.1%} in 95 of 100 cases\nkept in {one.kept}"
    )
