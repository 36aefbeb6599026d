"""Warm-up and stop rules on invented samples, the interval against scipy, and the loop under a virtual clock."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from statistics import median

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench import store, timing
from bench.cells import Cell
from bench.measurement import Measurement, Samples, SessionId
from bench.runtimes.protocol import Call

CELL = Cell("llama-7b", "eager", "float16", "sdpa", 12, 128, "none", 4)
TIMES = st.floats(1e-6, 1e3)


class Device:
    """Calls of given durations on a clock that only they move."""

    def __init__(self, duration: Callable[[int], float], steps: int = 3) -> None:
        self.now, self.calls, self._duration, self._steps = 0.0, 0, duration, steps

    def clock(self) -> float:
        return self.now

    def call(self) -> Call:
        took = self._duration(self.calls)
        self.calls += 1
        self.now += took
        return Call(took, took / 10, (took / 5,) * self._steps, 32)


def run(duration: Callable[[int], float], rule: timing.Rule, steps: int = 3) -> tuple[timing.Timing, Device]:
    device = Device(duration, steps)
    return timing.measure(device.call, device.clock, rule), device


def noisy(scale: float, sigma: float, seed: int = 0) -> Callable[[int], float]:
    source = random.Random(seed)
    return lambda _: scale * source.lognormvariate(0, sigma)


# -- the interval -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [*range(1, 60), 99, 100, 101, 1000])
def test_ranks_are_the_exact_binomial_ones(count: int) -> None:
    from scipy.stats import binom

    rank = timing.interval_rank(count)
    assert rank == 0 or 2 * binom.cdf(rank - 1, count, 0.5) <= 0.05
    assert 2 * binom.cdf(rank, count, 0.5) > 0.05


def test_the_interval_covers_the_median_as_often_as_it_says() -> None:
    """20 draws of a skewed distribution whose median is 1: at least 95 % of 2,000 intervals hold it."""
    source = random.Random(1)
    hits = 0
    for _ in range(2000):
        low, high = timing.interval([source.lognormvariate(0, 1) for _ in range(20)]) or (math.nan, math.nan)
        hits += low <= 1 <= high
    assert hits >= 1880  # 95.9 % expected; 1880 is 4 standard errors below


@given(st.lists(TIMES, min_size=1, max_size=60))
def test_the_interval_holds_the_sample_median(values: list[float]) -> None:
    ends = timing.interval(values)
    if len(values) < 6:
        assert ends is None
    else:
        assert ends is not None
        assert min(values) <= ends[0] <= median(values) <= ends[1] <= max(values)


# -- decisions --------------------------------------------------------------------------------------------------------


@given(st.lists(TIMES, max_size=150), st.floats(0, 1e4), st.floats(0.01, 100))
def test_the_stop_rule_keeps_its_bounds(calls: list[float], elapsed: float, budget: float) -> None:
    reason = timing.stop(calls, elapsed, timing.careful(budget))
    if len(calls) < timing.SHORTEST:
        assert reason is None
    elif len(calls) < timing.LEAST:
        assert reason == ("time" if elapsed >= timing.PATIENCE * budget else None)
    if len(calls) >= timing.LEAST and (elapsed >= budget or len(calls) >= timing.MOST):
        assert reason is not None
    if reason == "interval":
        width = timing.half_width(calls)
        assert width is not None
        assert width <= timing.TARGET


@given(st.lists(TIMES, min_size=1, max_size=40), st.floats(0, 1e3), st.floats(0.01, 100))
def test_warm_up_needs_three_calls_and_two_seconds(calls: list[float], elapsed: float, budget: float) -> None:
    warm = timing.is_warm(calls, elapsed, timing.careful(budget))
    if elapsed < timing.PATIENCE * budget and (len(calls) < 3 or elapsed < 2):
        assert not warm
    if elapsed >= timing.PATIENCE * budget:
        assert warm


def test_warm_up_goes_on_until_the_medians_are_flat() -> None:
    rule = timing.careful(60)
    falling = [2.0 * 0.9**i for i in range(12)]
    assert not timing.is_warm(falling, sum(falling), rule)
    assert timing.is_warm([*falling, *[0.6] * 24], sum(falling) + 24 * 0.6, rule)


def test_paper_mode_is_exactly_ten_and_twenty() -> None:
    result, device = run(noisy(100.0, 0.5), timing.rule("paper", 1.0))
    assert (result.warm_up, len(result.samples.call_s), result.stop) == (10, 20, "repeats")
    assert device.calls == 30


# -- what ends a cell -------------------------------------------------------------------------------------------------


def test_a_quiet_cell_ends_by_its_interval_after_ten() -> None:
    result, _ = run(noisy(0.1, 0.001), timing.careful(20))
    assert (result.stop, len(result.samples.call_s)) == ("interval", 10)


def test_a_noisy_cell_is_repeated_until_its_interval_is_narrow() -> None:
    result, _ = run(noisy(0.01, 0.02), timing.careful(20))
    assert result.stop == "interval"
    assert len(result.samples.call_s) > 10
    assert (timing.half_width(result.samples.call_s) or 1) <= timing.TARGET


def test_repeats_that_do_not_help_end_as_flat() -> None:
    """Two modes in turn: the interval spans both however often it is repeated."""
    result, _ = run(lambda i: 1.0 if i % 2 else 1.5, timing.careful(1000))
    assert (result.stop, len(result.samples.call_s)) == ("flat", timing.FLAT_FROM)


def test_the_budget_ends_a_cell_that_stays_noisy() -> None:
    result, _ = run(noisy(0.5, 0.1), timing.careful(8))
    assert result.stop == "time"
    assert 10 <= len(result.samples.call_s) <= 20


@pytest.mark.parametrize(("call_s", "repeats"), [(0.15, 10), (0.5, 10), (1.01, 6), (1.9, 4), (5.0, 3), (100.0, 3)])
def test_long_calls_get_fewer_repeats_but_never_less_than_three(call_s: float, repeats: int) -> None:
    """Budget 2 s: ten repeats as long as they take under 6 s, and one warm-up where a call takes longer than that."""
    result, device = run(noisy(call_s, 0.0001), timing.careful(2))
    assert len(result.samples.call_s) == repeats
    assert device.calls - repeats == result.warm_up
    assert (result.stop == "time") == (repeats < 10)
    assert result.warm_up == 1 or call_s < 6
    row = Measurement(CELL, CELL.id, "e", "ok", False, SessionId("s"), samples=result.samples)
    assert timing.is_short(row) == (repeats < 10)


@settings(deadline=None, max_examples=40)
@given(st.floats(1e-3, 20), st.floats(0, 0.3), st.floats(0.5, 20), st.integers(0, 99))
def test_no_cell_takes_much_longer_than_its_budget(scale: float, sigma: float, budget: float, seed: int) -> None:
    result, device = run(noisy(scale, sigma, seed), timing.careful(budget))
    longest = max(result.samples.call_s)
    assert device.now <= 2 * (timing.PATIENCE * budget + timing.WARM_UP_S) + 8 * max(longest, scale * 3)
    assert 3 <= len(result.samples.call_s) <= timing.MOST


def test_calls_must_produce_the_same_number_of_tokens() -> None:
    counts = iter([4] * 5 + [3] * 100)
    device = Device(lambda _: 1.0)

    def call() -> Call:
        return Call(device.call().call_s, 0.1, (), next(counts))

    with pytest.raises(AssertionError, match="different numbers of tokens"):
        timing.measure(call, device.clock, timing.careful(5))


def test_deciding_is_cheap_beside_the_shortest_calls() -> None:
    """20,000 calls of 0.1 ms: what is looked at does not grow with the calls so far."""
    looked: list[int] = []

    class Spy(list[float]):
        def __getitem__(self, key):
            found = super().__getitem__(key)
            looked.append(len(found) if isinstance(key, slice) else 1)
            return found

    timing.is_warm(Spy([1e-4] * 20_000), 2.0, timing.careful(20))
    assert sum(looked) < 200


# -- what is stored ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [0, 1, 127, 511, 4095])
def test_the_longest_rows_fit_a_line(steps: int) -> None:
    """100 repeats with device times and any output length stay under 8 KiB."""
    source = random.Random(0)
    calls = [
        Call(x := source.random(), x / 3, tuple(source.random() / 7e3 for _ in range(steps)), 9, x / 7)
        for _ in range(timing.MOST)
    ]
    samples = timing.samples(calls)
    assert len(samples.step_s) == min(steps, timing.LARGEST_STEPS)
    row = Measurement(CELL, CELL.id, "e" * 16, "ok", False, SessionId("s" * 16), samples=samples, telemetry={"a": 1})
    assert len(store.encode(row)) < 7 << 10


def test_thinned_steps_keep_their_mean() -> None:
    steps = tuple(float(i + 1) for i in range(1000))
    samples = timing.samples([Call(1.0, 0.1, steps, 1)])
    lengths = [1000 * (i + 1) // 256 - 1000 * i // 256 for i in range(256)]
    total = math.fsum(value * length for value, length in zip(samples.step_s, lengths, strict=True))
    assert total == pytest.approx(sum(steps), rel=1e-4)
    assert list(samples.step_s) == sorted(samples.step_s)


@given(st.lists(TIMES, min_size=1, max_size=20))
def test_stored_samples_keep_six_digits(values: list[float]) -> None:
    stored = timing.samples([Call(value, value, (), 1, value) for value in values])
    for column in (stored.call_s, stored.prefill_s, stored.device_s):
        assert column == pytest.approx(values, rel=1e-5)


# -- statistics on read -----------------------------------------------------------------------------------------------


def row(calls: tuple[float, ...], mode: str = "careful") -> Measurement:
    samples = Samples(calls, calls, calls)
    return Measurement(CELL, CELL.id, "e", "ok", False, SessionId("s"), samples=samples, timing=mode)


def test_throughput_is_tokens_over_the_median_and_the_mean_of_ratios_in_paper_mode() -> None:
    calls = (1.0, 2.0, 4.0, 8.0, 8.0, 8.0, 8.0)
    tokens = 4 * 128
    careful, paper = timing.throughput(row(calls)), timing.throughput(row(calls, "paper"))
    assert careful is not None
    assert paper is not None
    assert (careful.value, careful.low, careful.high) == (tokens / 8, tokens / 8, tokens / 1)
    assert paper.value == pytest.approx(sum(tokens / call for call in calls) / 7)
    latency = timing.latency(row(calls, "paper"))
    assert latency is not None
    assert latency.value == pytest.approx(sum(calls) / 7)


def test_a_row_without_samples_has_no_statistics() -> None:
    assert timing.latency(row(())) is None
    assert timing.throughput(row(())) is None
    assert timing.first_token(row(())) is None
    assert timing.per_token(row(())) is None
    assert not timing.is_short(row(()))
