"""`make gate-study`: how often the regression gate cries wolf, and how often it sleeps; simulated, and on this machine.

The simulated part is seeded and takes minutes. The real part runs whole experiments of tiny cells through `ab`, between
two copies of the sources: equal ones (A/A), or one with a spin in the decode step (planted). It takes hours, wants
the machine for itself, and goes on where it was stopped. The report is README.md with the numbers in results.json.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import msgspec
import typer

from bench import ab, environment, gate_simulation, sides
from bench.cells import Suite
from bench.comparison import Comparison
from bench.gate_report import SLOWDOWN, Real, Study, Trial, Verdict, limits, readme
from bench.gate_simulation import Discovery, Rate
from bench.metrics import LATENCY
from shortllama import console, files

SINGLES, EXPERIMENTS, CELLS = 10_000, 3_000, 50
EFFECTS = (0.0, 0.03, 0.05)

# One subject: the shape of the reference model with three blocks. Calls take some 10 ms, sessions ten seconds or so.
AA_SUITE = Suite(
    schema="shortllama.suite/1",
    subjects=("reference/depth:3",),
    runtimes=("eager", "static"),
    dtypes=("float32",),
    batch=(1, 2, 4, 8, 16),
    output=(4, 8),
    cell_seconds=0.2,
)
PLANTED_SUITE = msgspec.structs.replace(AA_SUITE, runtimes=("eager",), batch=(1,), output=(8,))

# What the planted copy appends to bench/runtimes/loop.py: a step spins for a share of the time that it took.
SPIN = f"""

def _spinning(step):
    from time import perf_counter

    def run(self, cache, ids, positions):
        start = perf_counter()
        token = step(self, cache, ids, positions)
        end = perf_counter() + {SLOWDOWN} * (perf_counter() - start)
        while perf_counter() < end:
            pass
        return token

    return run


Loop._step = _spinning(Loop._step)
"""


def study(
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Default: reports/gate-study_<device>_<date>; goes on there.")
    ] = None,
    simulated: Annotated[bool, typer.Option(help="Run the simulated part.")] = True,
    real: Annotated[bool, typer.Option(help="Run the real part, which takes hours on an idle machine.")] = True,
    experiments: Annotated[int, typer.Option(min=1, help="Real A/A experiments, of twenty cells each.")] = 10,
    planted: Annotated[int, typer.Option(min=1, help="Real experiments with a planted slowdown.")] = 20,
    trials: Annotated[
        int, typer.Option(min=10, help="Simulated comparisons of one cell; three tenths of it with fifty.")
    ] = SINGLES,
) -> int:
    """Measure the gate itself; example: python -m bench.gate_study --no-real"""
    machine = environment.machine("cpu")
    folder = out or Path("reports") / f"gate-study_{machine.slug}_{datetime.now(UTC).date().isoformat()}"
    file = folder / "results.json"
    found = files.decode_json(files.read_bytes(file), Study, str(file)) if file.exists() else Study()
    folder.mkdir(parents=True, exist_ok=True)

    def keep(changed: Study) -> None:
        files.write_atomically(file, files.encode_json(changed))
        files.write_atomically(folder / "README.md", readme(changed).encode())

    if simulated:
        rates, discoveries = simulate(trials)
        found = msgspec.structs.replace(found, rates=rates, discoveries=discoveries)
        keep(found)
    if real:
        runs = Path("runs") / folder.name
        for step in measure(runs, experiments, planted, found.real):
            found = msgspec.structs.replace(found, real=step)
            keep(found)
    console.say(f"wrote {folder / 'README.md'}")
    return int(not all(met for _, _, _, met in limits(found)))


# -- simulated --------------------------------------------------------------------------------------------------------


def simulate(trials: int) -> tuple[tuple[Rate, ...], tuple[Discovery, ...]]:
    """Return the error rates of every design on every kind of noise, and those of experiments with fifty cells."""
    noises = (gate_simulation.QUIET, gate_simulation.NOISY, *gate_simulation.DRIFTING)
    designs = gate_simulation.DESIGNS
    singles = [(noise, design, effect) for noise in noises for design in designs for effect in EFFECTS]
    several = [(design, effect) for design in designs for effect in (0.0, 0.03)]
    with console.progress() as bar:
        task = bar.add_task("simulated sessions", total=len(singles) + len(several))
        rates: list[Rate] = []
        for seed, one in enumerate(singles):
            rates.append(gate_simulation.single(*one, trials=trials, seed=seed))
            bar.advance(task)
        discoveries: list[Discovery] = []
        for seed, (design, effect) in enumerate(several):
            count = max(1, trials * EXPERIMENTS // SINGLES)
            discoveries.append(gate_simulation.many(gate_simulation.QUIET, design, effect, CELLS, count, seed))
            bar.advance(task)
    return tuple(rates), tuple(discoveries)


# -- real -------------------------------------------------------------------------------------------------------------


def measure(runs: Path, experiments: int, planted: int, before: Real | None = None) -> Generator[Real]:
    """Run what is missing of the real experiments into `runs`; yield what is known after each.

    An experiment that was finished before is read again from its files, and its load taken from `before`.
    """
    loads = {trial.name: trial.load for trial in (*before.same, *before.planted)} if before else {}
    found = Real(environment.measured(environment.machine("cpu"), environment.threads()))
    kinds = (("same", experiments, AA_SUITE, ""), ("planted", planted, PLANTED_SUITE, SPIN))
    for kind, count, suite, appended in kinds:
        with copied("") as base, copied(appended) as head:
            for number in range(1, count + 1):
                name = f"{kind}-{number:02}"
                compared = _experiment(runs / name, (base, head), suite)
                trial = _trial(name, compared, loads.get(name) or os.getloadavg()[1])
                found = msgspec.structs.replace(found, **{kind: (*getattr(found, kind), trial)})
                yield found


def _experiment(folder: Path, trees: tuple[Path, Path], suite: Suite) -> Comparison:
    """One experiment between two trees; one that is finished is read, one that was begun goes on."""
    base, head = sides.understand(str(trees[0]), str(trees[1]), sides.HERE)
    console.say(f"{folder}: {'goes on' if (folder / ab.FILE).exists() else 'begins'}")
    return ab.measure(base, head, ab.Asked(suite, device="cpu"), folder, resume=True)


@contextmanager
def copied(appended: str) -> Generator[Path]:
    """Yield a copy of the running sources, with a text appended to the decode loop: hours later, they are the same."""
    with tempfile.TemporaryDirectory(prefix="shortllama-gate-") as folder:
        for package in ("bench", "shortllama"):
            shutil.copytree(sides.HERE / package, Path(folder) / package, ignore=shutil.ignore_patterns("__pycache__"))
        if appended:
            loop = Path(folder) / "bench" / "runtimes" / "loop.py"
            files.write_atomically(loop, loop.read_bytes() + appended.encode())
        yield Path(folder)


def _trial(name: str, found: Comparison, load: float) -> Trial:
    cells = tuple(
        Verdict(
            one.cell, one.decision.verdict, one.decision.ratio, one.decision.pairs, one.decision.p,
            one.decision.detectable,
        )
        for one in found.changes
        if one.metric == LATENCY.name
    )  # fmt: skip
    alarm = any(one.decision.verdict == "regressed" and one.gates for one in found.changes)
    return Trial(name, alarm, cells, load)


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(study)
    sys.exit(console.run(app))
