"""When to stop warming up, when to stop repeating, and what the samples say. Decisions are pure; `measure` is the loop.

The only clock is the one passed in (a session's own, virtual in a simulation). Samples are stored raw; medians and
intervals are computed on read.

Careful mode, for a budget of S seconds a cell (`cell_seconds`):
- warm-up ends when at least 3 calls and 2 s have passed and, of the last 60 calls or fewer, the medians of the last
  third and of the third before agree within 2 %. It is given up when S (and those 3 calls and 2 s) are spent, or when
  3 S are spent: a call as long as that needs no more warming.
- repeats end by the first of
  `interval`: at least 10 repeats, and the median's 95 % interval is within 1 % of it to either side on average;
  `flat`: the interval's half-width at 20, 40, 80 repeats is above 0.9 of what it was at half as many (independent
  samples shrink it to 0.71): more repeats do not help, the noise is not of that kind;
  `time`: S seconds are spent and there are 10 repeats. Where calls are so long that 10 would take more than 3 S, the
  repeats end at 3 S, but never before the 3rd; `is_short` tells such cells;
  `repeats`: 100 repeats, the most that a row of a results file keeps.
Paper mode is exactly 10 warm-ups and 20 repeats.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import pairwise
from statistics import median

import msgspec

from bench.measurement import Measurement, Samples
from bench.runtimes.protocol import Call

WARM_UP_CALLS = 3
WARM_UP_S = 2.0
WARM_UP_WINDOW = 60
FLAT_WARM_UP = 0.02
LEAST = 10
SHORTEST = 3
MOST = 100
TARGET = 0.01
PATIENCE = 3.0
FLAT_SHRINK = 0.9
FLAT_FROM = 20
LARGEST_STEPS = 256


class Rule(msgspec.Struct, frozen=True):
    """How long to measure: `seconds` is the budget of the repeats; with `exact` = (warm-ups, repeats) nothing else."""

    name: str
    seconds: float
    exact: tuple[int, int] | None = None


def careful(seconds: float) -> Rule:
    """Return the careful rule for a budget of `seconds` a cell."""
    return Rule("careful", seconds)


def paper() -> Rule:
    """Return the paper's rule: 30 calls, of which the first 10 are dropped (Shortened LLaMA, arXiv 2402.02834)."""
    return Rule("paper", math.inf, (10, 20))


def rule(name: str, seconds: float) -> Rule:
    """Return the rule that a suite names."""
    return paper() if name == "paper" else careful(seconds)


# -- decisions ---------------------------------------------------------------------------------------------------------


def is_warm(calls_s: Sequence[float], elapsed_s: float, rule: Rule) -> bool:
    """Return whether warm-up may end after calls of these durations and `elapsed_s` seconds of the clock."""
    if rule.exact:
        return len(calls_s) >= rule.exact[0]
    if not calls_s:
        return False
    if elapsed_s >= PATIENCE * rule.seconds:
        return True
    if len(calls_s) < WARM_UP_CALLS or elapsed_s < WARM_UP_S:
        return False
    recent = calls_s[-WARM_UP_WINDOW:]
    third = len(recent) // 3
    before, last = median(recent[-2 * third : -third]), median(recent[-third:])
    return abs(last - before) <= FLAT_WARM_UP * before or elapsed_s >= rule.seconds


def stop(calls_s: Sequence[float], elapsed_s: float, rule: Rule) -> str | None:
    """Return why the repeats end here (interval, flat, time, repeats), or None to go on."""
    count = len(calls_s)
    if rule.exact:
        return "repeats" if count >= rule.exact[1] else None
    if count < LEAST:
        return "time" if count >= SHORTEST and elapsed_s >= PATIENCE * rule.seconds else None
    width = half_width(calls_s)
    if width is not None and width <= TARGET:
        return "interval"
    if is_flat(calls_s):
        return "flat"
    if elapsed_s >= rule.seconds:
        return "time"
    return "repeats" if count >= MOST else None


def is_flat(calls_s: Sequence[float]) -> bool:
    """Return whether doubling the repeats has stopped to narrow the interval; asked at 20, 40, 80 repeats only.

    At every repeat, noise alone would answer yes sooner or later.
    """
    count = len(calls_s)
    doublings = count / FLAT_FROM
    if doublings < 1 or doublings != 2 ** int(math.log2(doublings)):
        return False
    now, before = half_width(calls_s), half_width(calls_s[: count // 2])
    return now is not None and before is not None and now > FLAT_SHRINK * before


def is_short(measurement: Measurement) -> bool:
    """Return whether a careful cell has fewer than 10 repeats because its calls are long; reports mark it."""
    return measurement.timing == "careful" and 0 < len(measurement.samples.call_s) < LEAST


# -- statistics --------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=4096)
def interval_rank(count: int) -> int:
    """Return the largest k for which (k-th smallest, k-th largest) holds the median with 95 % confidence; 0 if none.

    The number of samples below the median is binomial(count, 1/2), whatever the distribution, so the interval misses
    with probability 2 P(B < k): exact, conservative by discreteness only. The first such count is 6.
    """
    tail = 0.0
    for below in range(count // 2 + 1):
        log_share = math.lgamma(count + 1) - math.lgamma(below + 1) - math.lgamma(count - below + 1)
        tail += math.exp(log_share - count * math.log(2))
        if 2 * tail > 0.05:
            return below
    return 0


def interval(values: Sequence[float]) -> tuple[float, float] | None:
    """Return the order-statistic 95 % interval of the median (see `interval_rank`); None for fewer than 6 values."""
    rank = interval_rank(len(values))
    if rank == 0:
        return None
    ordered = sorted(values)
    return ordered[rank - 1], ordered[-rank]


def half_width(values: Sequence[float]) -> float | None:
    """Return half the interval's width as a share of the median; None where there is no interval."""
    ends = interval(values)
    return None if ends is None else (ends[1] - ends[0]) / (2 * median(values))


class Estimate(msgspec.Struct, frozen=True):
    """A value with the ends of its 95 % interval (None with fewer than 6 samples, or in paper mode)."""

    value: float
    low: float | None
    high: float | None
    count: int


def estimate(values: Sequence[float], timing: str = "careful") -> Estimate | None:
    """Return the median with its interval; in paper mode the mean, as the paper reports. None without samples."""
    if not values:
        return None
    if timing == "paper":
        return Estimate(math.fsum(values) / len(values), None, None, len(values))
    ends = interval(values) or (None, None)
    return Estimate(median(values), ends[0], ends[1], len(values))


def latency(measurement: Measurement) -> Estimate | None:
    """Return seconds a call."""
    return estimate(measurement.samples.call_s, measurement.timing)


def first_token(measurement: Measurement) -> Estimate | None:
    """Return seconds to the first token."""
    return estimate(measurement.samples.prefill_s, measurement.timing)


def per_token(measurement: Measurement) -> float | None:
    """Return the median seconds of one decode step over all positions; None where there are no step times."""
    steps = measurement.samples.step_s
    return median(steps) if steps else None


def throughput(measurement: Measurement) -> Estimate | None:
    """Return new tokens a second, all sequences together: batch x output / median latency.

    In paper mode the mean of the ratios of the repeats, which is what the paper reports.
    """
    tokens = measurement.cell.batch * measurement.cell.output
    if measurement.timing == "paper":
        return estimate([tokens / call for call in measurement.samples.call_s], "paper")
    call = latency(measurement)
    if call is None:
        return None
    low = None if call.high is None else tokens / call.high
    high = None if call.low is None else tokens / call.low
    return Estimate(tokens / call.value, low, high, call.count)


# -- the loop ----------------------------------------------------------------------------------------------------------


class Timing(msgspec.Struct, frozen=True):
    """What `measure` hands back: fields of a Measurement under the same names."""

    samples: Samples
    warm_up: int
    stop: str
    tokens: int


def measure(call: Callable[[], Call], clock: Callable[[], float], rule: Rule) -> Timing:
    """Warm up, repeat and stop by `rule`. Exceptions of `call` pass through.

    `call` runs one whole synchronised generation; `clock` returns seconds.
    """
    warm: list[float] = []
    start = clock()
    while not is_warm(warm, clock() - start, rule):
        warm.append(call().call_s)
    calls: list[Call] = []
    durations: list[float] = []
    start = clock()
    while True:
        calls.append(call())
        durations.append(calls[-1].call_s)
        reason = stop(durations, clock() - start, rule)
        if reason:
            break
    assert len({one.tokens for one in calls}) == 1, "calls of one cell produced different numbers of tokens"
    return Timing(samples(calls), len(warm), reason, calls[0].tokens)


def samples(calls: Sequence[Call]) -> Samples:
    """Return the calls as stored: 6 significant digits a repeat, 5 a step, so that a row stays under 8 KiB.

    Step times are medians over the repeats per position. Above 256 positions, each value is the mean of the medians
    of a run of neighbouring positions (runs of equal length but for rounding).
    """
    steps = [median(position) for position in zip(*(one.step_s for one in calls), strict=True)]
    device = tuple(one.device_s for one in calls if one.device_s is not None)
    return Samples(
        call_s=tuple(_rounded(one.call_s, 6) for one in calls),
        prefill_s=tuple(_rounded(one.prefill_s, 6) for one in calls),
        step_s=tuple(_rounded(value, 5) for value in _thinned(steps)),
        device_s=tuple(_rounded(value, 6) for value in device),
    )


def _thinned(steps: Sequence[float]) -> Sequence[float]:
    if len(steps) <= LARGEST_STEPS:
        return steps
    edges = [len(steps) * i // LARGEST_STEPS for i in range(LARGEST_STEPS + 1)]
    return [math.fsum(steps[a:b]) / (b - a) for a, b in pairwise(edges)]


def _rounded(value: float, digits: int) -> float:
    return float(f"{value:.{digits}g}")
