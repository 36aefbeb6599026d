"""How often the gate errs, on simulated sessions: the same verdicts that `compare` and `ab` reach, thousands of times.

The noise is that of a study of real sessions: a session has a level, log-normal with `between`, and 20 samples around
it, log-normal with `within`, of which 5 % are stretched by an exponential of mean 5 `within`. Sessions of a pair follow
each other, base first in odd pairs; where there is drift, each session is slower than the one before.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import msgspec

from bench.metrics import LATENCY
from bench.sequential import FULL, Looks, looks_of
from bench.verdicts import Decision, Rules, by_pairs, withdrawn

if TYPE_CHECKING:
    import numpy as np

SAMPLES, STRETCHED, STRETCH = 20, 0.05, 5.0
MOST = FULL.most


class Noise(msgspec.Struct, frozen=True):
    """Standard deviations of log times, between and within sessions; drift of the log level from session to session."""

    name: str
    between: float
    within: float
    drift: float = 0.0


class Design(msgspec.Struct, frozen=True):
    """How many pairs are judged: `looks` as an experiment declares them, None for files that declare nothing (then
    `counts` are the pairs that a user would have)."""

    name: str
    counts: tuple[int, ...]
    looks: Looks | None = None


QUIET, NOISY = Noise("quiet device", 0.01, 0.005), Noise("noisy shared machine", 0.03, 0.02)
DRIFTING = tuple(
    msgspec.structs.replace(one, name=f"{one.name}, drift 0.3 % a session", drift=0.003) for one in (QUIET, NOISY)
)
GROWING = tuple(range(FULL.first, MOST + 1))
AB = Design("ab: 5 pairs, up to 12 while inconclusive", GROWING, FULL)
FIVE = Design("compare: 5 pairs, one look", (5,))
FILES = Design("compare: 5 pairs, then files of 6 to 12 while inconclusive", GROWING)
TWELVE = Design("ab --pairs 12: one look", (12,), Looks(12, 12))
DESIGNS = (AB, FIVE, FILES, TWELVE)


class Rate(msgspec.Struct, frozen=True):
    """What became of `trials` comparisons of one cell: shares of verdicts, and the mean number of pairs."""

    noise: str
    design: str
    effect: float
    trials: int
    regressed: float
    improved: float
    equivalent: float
    pairs: float


class Discovery(msgspec.Struct, frozen=True):
    """What became of experiments with many cells, of which one has the effect (0: none has).

    `false_discovery_rate`: mean share of wrong verdicts among all verdicts "regressed" or "improved" of an experiment;
    `power`: how often the one effect was found, `alarms`: how often any other cell regressed.
    """

    noise: str
    design: str
    effect: float
    cells: int
    trials: int
    false_discovery_rate: float
    power: float | None
    alarms: float
    pairs: float


def log_ratios(noise: Noise, shape: tuple[int, ...], source: np.random.Generator) -> np.ndarray:
    """Return the log ratios of paired sessions of equal code, shape (..., pairs)."""
    import numpy as np

    def medians() -> np.ndarray:
        samples = source.normal(0, noise.within, (*shape, SAMPLES))
        stretched = source.random((*shape, SAMPLES)) < STRETCHED
        samples += stretched * source.exponential(STRETCH * noise.within, (*shape, SAMPLES))
        return source.normal(0, noise.between, shape) + np.median(samples, axis=-1)

    turn = np.where(np.arange(shape[-1]) % 2 == 0, 1, -1)  # head second in odd pairs: slower by one step of drift
    return medians() - medians() + noise.drift * turn


def single(noise: Noise, design: Design, effect: float, trials: int, seed: int) -> Rate:
    """Return what becomes of one cell whose head is slower by `effect` (a share)."""
    import numpy as np

    logs = log_ratios(noise, (trials, MOST), np.random.default_rng(seed)) + math.log1p(effect)
    verdicts: list[str] = []
    pairs = 0
    for row in logs.tolist():
        verdict, count = "inconclusive", 0
        for count in design.counts:
            verdict = _judge(row[:count], design).verdict
            if verdict != "inconclusive":
                break
        verdicts.append(verdict)
        pairs += count
    shares = [verdicts.count(name) / trials for name in ("regressed", "improved", "equivalent")]
    return Rate(noise.name, design.name, effect, trials, *shares, pairs=pairs / trials)


def many(noise: Noise, design: Design, effect: float, cells: int, trials: int, seed: int) -> Discovery:
    """Return what becomes of experiments with `cells` cells, the first of them slower by `effect`."""
    import numpy as np

    source = np.random.default_rng(seed)
    false_shares, found, alarms, pairs = 0.0, 0, 0, 0
    for _ in range(trials):
        logs = log_ratios(noise, (cells, MOST), source)
        logs[0] += math.log1p(effect)
        verdicts, counted = _experiment(logs.tolist(), design)
        flagged = [verdict in ("regressed", "improved") for verdict in verdicts]
        wrong = sum(flagged) - (flagged[0] if effect else 0)
        false_shares += wrong / max(1, sum(flagged))
        found += verdicts[0] == "regressed"
        alarms += "regressed" in verdicts[bool(effect) :]
        pairs += counted
    power = found / trials if effect else None
    return Discovery(
        noise.name, design.name, effect, cells, trials, false_shares / trials, power, alarms / trials,
        pairs / trials / cells,
    )  # fmt: skip


def _experiment(logs: Sequence[Sequence[float]], design: Design) -> tuple[list[str], int]:
    """The verdicts on all cells, and the pairs measured: as `ab` goes on with the cells that are inconclusive."""
    cells = len(logs)
    counts = [0] * cells
    verdicts = ["inconclusive"] * cells
    for pair in range(1, design.counts[-1] + 1):
        for index in range(cells):
            counts[index] += verdicts[index] == "inconclusive"
        if pair >= design.counts[0]:
            decisions = [_judge(row[:count], design, cells) for row, count in zip(logs, counts, strict=True)]
            verdicts = [one.verdict for one in withdrawn([LATENCY.name] * cells, decisions)]
    return verdicts, sum(counts)


def _judge(logs: Sequence[float], design: Design, tests: int = 1) -> Decision:
    return by_pairs(LATENCY, logs, Rules(tests=tests, looks=design.looks or looks_of(len(logs))))
