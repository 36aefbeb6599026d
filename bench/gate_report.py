"""The report of the gate study: what was found, what had to be reached, and both as Markdown. Pure but for a bound."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Literal

import msgspec

from bench import gate_simulation
from bench.gate_simulation import Discovery, Rate
from bench.measurement import Environment
from bench.report import wording

SLOWDOWN = 0.15  # of the step, planted in the real part


class Verdict(msgspec.Struct, frozen=True):
    """One cell of one real experiment: the verdict on its latency and what it rests on."""

    cell: str
    verdict: str
    ratio: float | None
    pairs: int
    p: float | None
    detectable: float | None


class Trial(msgspec.Struct, frozen=True):
    """One real experiment. `alarm`: some metric of some cell regressed, so the command would exit with 1.

    `load`: runnable processes of the whole machine, mean over five minutes, as the experiment was read off.
    """

    name: str
    alarm: bool
    cells: tuple[Verdict, ...]
    load: float | None = None


class Real(msgspec.Struct, frozen=True):
    """The real part, as far as it was run; `seconds` of the experiments of this start alone."""

    environment: Environment
    same: tuple[Trial, ...] = ()
    planted: tuple[Trial, ...] = ()


class Study(msgspec.Struct, frozen=True):
    """results.json. Schema history: shortllama.gate-study/1: first."""

    rates: tuple[Rate, ...] = ()
    discoveries: tuple[Discovery, ...] = ()
    real: Real | None = None
    schema: Literal["shortllama.gate-study/1"] = "shortllama.gate-study/1"


def limits(found: Study) -> list[tuple[str, str, str, bool]]:
    """Return what the gate must reach: (what, limit, found, whether it does), of the parts that were run."""
    rows: list[tuple[str, str, str, bool]] = []
    rates = {(one.noise, one.design, one.effect): one for one in found.rates}
    quiet, noisy, design = gate_simulation.QUIET.name, gate_simulation.NOISY.name, gate_simulation.AB.name
    if found.rates:
        for noise, limit in ((quiet, 0.015), (noisy, 0.05)):
            share = rates[noise, design, 0.0].regressed
            rows.append((f"false alarms, {noise}", f"at most {limit:.1%}", f"{share:.2%}", share <= limit))
        power = rates[quiet, design, 0.03].regressed
        rows.append((f"+3 % found, {quiet}", "at least 95 %", f"{power:.1%}", power >= 0.95))
    for one in found.discoveries:
        if one.design == design and one.effect:
            share = one.false_discovery_rate
            rows.append((f"false-discovery rate, {one.cells} cells", "at most 5 %", f"{share:.2%}", share <= 0.05))
    if found.real and found.real.planted:
        hits, count = _planted(found.real)
        rows.append(
            (f"planted {SLOWDOWN:.0%} found, real", "at least 18 of 20", f"{hits} of {count}", hits >= 0.9 * count)
        )
    return rows


def _planted(real: Real) -> tuple[int, int]:
    hits = sum(all(cell.verdict == "regressed" for cell in trial.cells) for trial in real.planted)
    return hits, len(real.planted)


def upper_bound(count: int, trials: int) -> float:
    """Return the rate that `count` of `trials` independent ones exclude with 95 % confidence (Clopper and Pearson)."""
    from scipy.special import betaincinv

    return 1.0 if count == trials else float(betaincinv(count + 1, trials - count, 0.95))


def readme(found: Study) -> str:
    """Return the report in Markdown: limits first, then every number."""
    lines = ["# How far the regression gate can be believed", ""]
    lines += ["Written by `make gate-study`; the numbers are in [results.json](results.json).", ""]
    checks = [(what, limit, seen, "yes" if met else "**no**") for what, limit, seen, met in limits(found)]
    lines += _table(("what", "limit", "found", "met"), checks)
    if found.rates:
        lines += _simulated(found)
    lines += _real(found.real)
    return "\n".join(lines) + "\n"


def _simulated(found: Study) -> list[str]:
    noises = (gate_simulation.QUIET, gate_simulation.NOISY)
    levels = "; ".join(f"{one.name}: {one.between:.1%} between sessions, {one.within:.1%} within" for one in noises)
    lines = [
        "", "## Simulated sessions", "",
        f"{levels}. A session is the median of {gate_simulation.SAMPLES} samples, of which 5 % are stretched. Every "
        f"verdict is that of the code that `compare` and `ab` run; {found.rates[0].trials:,} comparisons a row.", "",
    ]  # fmt: skip
    rates = {(one.noise, one.design, one.effect): one for one in found.rates}
    effects = sorted({one.effect for one in found.rates if one.effect})
    heads = ("noise", "design", "equal code: regressed", "improved", "equivalent", "pairs")
    slower = [f"{effect:+.0%}: regressed" for effect in effects]
    rows: list[tuple[str, ...]] = []
    for (noise, design, effect), one in rates.items():
        if effect == 0:
            shares = (f"{one.regressed:.2%}", f"{one.improved:.2%}", f"{one.equivalent:.1%}", f"{one.pairs:.1f}")
            powers = (f"{rates[noise, design, other].regressed:.1%}" for other in effects)
            rows.append((noise, design, *shares, *powers))
    lines += _table((*heads, *slower), rows)
    if found.discoveries:
        first = found.discoveries[0]
        lines += [
            "", f"With {first.cells} cells, one of them slower or none, on a {first.noise}; "
            f"{first.trials:,} experiments a row. An alarm is any other cell called regressed.", "",
        ]  # fmt: skip
        heads = ("design", "true slowdown", "false-discovery rate", "power", "alarms", "pairs a cell")
        lines += _table(heads, [_discovery(one) for one in found.discoveries])
    return lines


def _discovery(one: Discovery) -> tuple[str, ...]:
    power = "" if one.power is None else f"{one.power:.1%}"
    effect = f"{one.effect:+.0%}" if one.effect else "none"
    return one.design, effect, f"{one.false_discovery_rate:.2%}", power, f"{one.alarms:.2%}", f"{one.pairs:.1f}"


def _real(real: Real | None) -> list[str]:
    lines = ["", "## This machine", ""]
    if real is None:
        command = 'make gate-study OPTIONS="--no-simulated --out FOLDER"'
        return [*lines, f"Not run yet. On an idle machine, with this folder as FOLDER: `{command}`."]
    fingerprint, facts = real.environment.fingerprint, real.environment.facts
    lines += [
        f"{fingerprint['device']}, {wording.plural(fingerprint['threads'], 'thread')}, torch {fingerprint['torch']}, "
        f"{facts['date'][:10]}, commit {facts['commit']}; experiments by `ab`, between two copies of the sources. "
        f"Processors that they may use: {fingerprint['affinity']}{_loads(real)}.",
        "",
    ]
    cells = [cell for trial in real.same for cell in trial.cells]
    rows: list[tuple[str, ...]] = []
    for what, count, total in (
        ("A/A cell comparisons called regressed", sum(cell.verdict == "regressed" for cell in cells), len(cells)),
        ("A/A cell comparisons called improved", sum(cell.verdict == "improved" for cell in cells), len(cells)),
        ("A/A experiments that would have failed", sum(trial.alarm for trial in real.same), len(real.same)),
    ):
        if total:
            rows.append((what, f"{count} of {total}", f"{count / total:.2%}", f"{upper_bound(count, total):.2%}"))
    hits, total = _planted(real)
    lines += _table(("what", "found", "rate", "95 % upper bound"), rows)
    lines += ["", "Cells of one experiment share sessions, so the bound over cells is smaller than it should be."]
    detectable = [cell.detectable for cell in cells if cell.detectable is not None]
    if detectable:
        settled = sum(cell.verdict == "equivalent" for cell in cells)
        lines[-1] += (
            f" {settled} of {len(cells)} comparisons ended as equivalent; the effect that would be found in four of "
            f"five experiments has the median {statistics.median(detectable):.1%}."
        )
    if total:
        ratios = [cell.ratio for trial in real.planted for cell in trial.cells if cell.ratio]
        mean = math.exp(math.fsum(map(math.log, ratios)) / len(ratios))
        lines += [
            "",
            f"Planted: a spin of {SLOWDOWN:.0%} in the decode step was found in {hits} of {total} experiments; ",
        ]
        lines[-1] += f"measured, it is {mean - 1:+.1%} of the call."
    return lines


def _loads(real: Real) -> str:
    """The range of loads, to tell an idle machine from one that others used as well."""
    loads = [trial.load for trial in (*real.same, *real.planted) if trial.load is not None]
    return f"; the machine's load was {min(loads):.1f} to {max(loads):.1f} runnable processes" if loads else ""


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (heads, ("---",) * len(heads), *rows)]
