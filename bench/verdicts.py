"""From two sides of one metric to a verdict. Pure; knows of series of session values, not of files or cells.

The unit of replication is a process session: the samples of different processes are never pooled into one test. One
session a side says nothing about the noise between sessions, so it cannot decide, except against a limit that the user
names, with the noise on top. Simulated values and deterministic metrics have no noise and always decide. Where pairs
were added while nothing was decided, intervals and p allow for the looks in between (see `sequential`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import median

import msgspec

from bench.metrics import BY_NAME, Metric
from bench.sequential import SHARE, Looks, looks_of
from bench.statistics import adjusted, detectable, mean_of

FLOOR = 0.015
NOISE = 0.03  # between sessions, where the machine's own is not stored
ROUNDING = 1e-5  # samples are stored with six significant digits, so equal times may differ by this
MOST_DETECTABLE = 10.0  # stands for a tenfold slowdown and any larger one
BEYOND = 1e6  # "worse" without a ratio: out of memory, or something where nothing was

Series = Sequence[tuple[int, float]]  # (number of the pair or 0, the session's value)


class Rules(msgspec.Struct, frozen=True):
    """`limits`: the share of worsening let pass, by metric; `noise`: between sessions; `tests`: cells tested;
    `looks`: how the pairs were judged while they grew, None where nothing says so."""

    limits: dict[str, float] = {}
    noise: float = NOISE
    tests: int = 1
    looks: Looks | None = None

    def floor(self, metric: Metric) -> float:
        """Return the effect, as a log ratio, up to which a difference does not matter."""
        return math.log1p(self.limits.get(metric.name, FLOOR))

    def gates(self, metric: Metric) -> bool:
        """Return whether a regression of `metric` fails the run: with limits, the exact ones and those named."""
        return metric.exact or not self.limits or metric.name in self.limits


class Decision(msgspec.Struct, frozen=True):
    """A verdict with what it rests on. `ratio` = head / base with its interval, which misses in 5 of 100 experiments,
    all looks counted, and `p` likewise; `worse`: its log, turned so that worse is positive; `detectable`: the least
    worsening (a share) that would have been found.

    verdict: regressed, improved, equivalent, inconclusive, incomparable.
    """

    verdict: str
    base: float | str | None = None
    head: float | str | None = None
    ratio: float | None = None
    low: float | None = None
    high: float | None = None
    worse: float = 0.0
    pairs: int = 0
    p: float | None = None
    detectable: float | None = None
    reason: str | None = None


def exactly(metric: Metric, base: float, head: float, rules: Rules) -> Decision:
    """Decide a metric without noise: any difference beyond its slack and its limit counts."""
    if base > 0 and head > 0:
        ratio, worse = head / base, metric.worse(math.log(head / base))
    else:
        ratio, worse = None, 0.0 if base == head else metric.worse(math.copysign(BEYOND, head - base))
    verdict = "equivalent"
    if abs(head - base) > metric.slack and abs(worse) > math.log1p(rules.limits.get(metric.name, 0.0)):
        verdict = "regressed" if worse > 0 else "improved"
    return Decision(verdict, base, head, ratio, worse=worse)


def simulated(metric: Metric, base: Series, head: Series, rules: Rules) -> Decision:
    """Decide a simulated time: exact but for the rounding of stored samples."""
    before, after = _middle(base), _middle(head)
    worse = metric.worse(math.log(after / before))
    allowed = max(ROUNDING, math.log1p(rules.limits.get(metric.name, 0.0)))
    verdict = "regressed" if worse > allowed else "improved" if worse < -allowed else "equivalent"
    return Decision(verdict, before, after, after / before, worse=worse, reason="simulated: exact")


def incomparable(base: Series, head: Series) -> Decision:
    """Both values, without a verdict on them."""
    before, after = _middle(base), _middle(head)
    return Decision("incomparable", before, after, after / before, reason="environments differ")


def timed(metric: Metric, base: Series, head: Series, rules: Rules) -> Decision:
    """Decide a measured time: by paired sessions where there are two pairs, else with the doubt of a single one."""
    logs = list(log_ratios(base, head).values())
    before, after = _middle(base), _middle(head)
    if len(logs) < 2:
        return _by_single(metric, before, after, rules)
    return msgspec.structs.replace(by_pairs(metric, logs, rules), base=before, head=after)


def log_ratios(base: Series, head: Series) -> dict[int, float]:
    """Return log(head / base) of every pair that both sides have, by its number."""
    left, right = ({pair: value for pair, value in side if pair} for side in (base, head))
    return {pair: math.log(right[pair] / value) for pair, value in left.items() if pair in right}


def ratio_of(base: Series, head: Series) -> float:
    """Return head / base: by paired sessions where there are two pairs, else of the medians over sessions."""
    logs = log_ratios(base, head).values()
    return math.exp(math.fsum(logs) / len(logs)) if len(logs) > 1 else _middle(head) / _middle(base)


def _middle(series: Series) -> float:
    return median(value for _, value in series)


def by_pairs(metric: Metric, logs: Sequence[float], rules: Rules) -> Decision:
    """Decide by the t-interval on the log ratios of at least two paired sessions, against the floor."""
    count = len(logs)
    looks = rules.looks or looks_of(count)
    mean = mean_of(logs, looks.level(count) or SHARE)
    low, high = sorted((metric.worse(mean.low), metric.worse(mean.high)))
    floor, worse = rules.floor(metric), metric.worse(mean.value)
    decision = Decision(
        verdict_of(worse, low, high, floor),
        ratio=math.exp(mean.value),
        low=math.exp(mean.low),
        high=math.exp(mean.high),
        worse=worse,
        pairs=count,
    )
    if count < looks.first:
        reason = f"{count} of {looks.first} pairs so far"
        return msgspec.structs.replace(decision, verdict="inconclusive", reason=reason)
    # A lone true effect among many cells must pass the first step of Benjamini and Hochberg.
    least = detectable(mean.error, count, floor, looks.level(count, SHARE / rules.tests))
    least = math.expm1(min(least, math.log1p(MOST_DETECTABLE)))
    return msgspec.structs.replace(decision, p=looks.p(mean.p, count), detectable=least)


def verdict_of(worse: float, low: float, high: float, floor: float) -> str:
    """Return the verdict of an effect and the ends of its interval: log ratios, worse being positive."""
    if low > 0 and worse > floor:
        return "regressed"
    if high < 0 and worse < -floor:
        return "improved"
    return "equivalent" if -floor <= low and high <= floor else "inconclusive"


def _by_single(metric: Metric, before: float, after: float, rules: Rules) -> Decision:
    limit = rules.limits.get(metric.name)
    worse = metric.worse(math.log(after / before))
    least = (FLOOR if limit is None else limit) + rules.noise
    verdict, reason = "inconclusive", f"one session a side; the noise between sessions is taken as {rules.noise:.1%}"
    if limit is not None and worse > math.log1p(least):
        verdict, reason = (
            "regressed",
            f"one session a side: over the limit {limit:.1%} plus the noise {rules.noise:.1%}",
        )
    return Decision(verdict, before, after, after / before, worse=worse, detectable=least, reason=reason)


def withdrawn(metrics: Sequence[str], decisions: Sequence[Decision]) -> list[Decision]:
    """Return the decisions without those that Benjamini-Hochberg at 5 % does not uphold among a metric's cells."""
    result = list(decisions)
    for name in BY_NAME:
        tested = [i for i, metric in enumerate(metrics) if metric == name and decisions[i].p is not None]
        for index, q in zip(tested, adjusted([decisions[i].p or 0.0 for i in tested]), strict=True):
            if q > SHARE and decisions[index].verdict in ("regressed", "improved"):
                reason = f"not beyond chance among {len(tested)} cells (adjusted p {q:.2f})"
                result[index] = msgspec.structs.replace(decisions[index], verdict="inconclusive", reason=reason)
    return result
