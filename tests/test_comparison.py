"""The gate: silent on equal code, loud on planted regressions, and honest about what it cannot tell."""

from __future__ import annotations

import json
import math
import random
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest
import typer
from hypothesis import given, settings
from hypothesis import strategies as st

from bench import comparison_text, statistics, store
from bench.cells import Cell
from bench.compare import compare as verb
from bench.comparison import Comparison, compare, dense_of, exit_code, limits_of
from bench.measurement import (
    Bounds,
    Environment,
    Frontier,
    Measurement,
    Memory,
    Samples,
    SessionId,
    environment,
)
from bench.store import Results
from bench.verdicts import verdict_of
from shortllama import console
from shortllama.errors import IncomparableError, InputError

HERE = environment({"device": "x", "torch": "2.13"}, {})
THERE = environment({"device": "y", "torch": "2.13"}, {})


def cell(batch: int = 1, subject: str = "m", runtime: str = "eager") -> Cell:
    return Cell(subject, runtime, "float16", "sdpa", 12, 128, "none", batch)


def row(one: Cell, calls: Sequence[float] = (), **more: Any) -> Measurement:
    more = {"environment": HERE.id, "outcome": "ok", "simulated": False, "session": SessionId("s")} | more
    samples = Samples(tuple(calls), tuple(x / 10 for x in calls), tuple(x / 100 for x in calls))
    return Measurement(one, one.id, samples=samples, **more)


def results(
    *rows: Measurement, frontiers: Sequence[Frontier] = (), environments: Sequence[Environment] = ()
) -> Results:
    known = {one.id: one for one in (HERE, THERE, *environments)}
    return Results(Path("run"), known, rows, tuple(frontiers))


def session(source: random.Random, factor: float = 1.0, *, between: float = 0.01, within: float = 0.005) -> list[float]:
    """20 samples of one process, as the gate's study assumes them: log-normal with a right tail."""
    level = 0.05 * factor * source.lognormvariate(0, between)
    tail = [source.expovariate(1 / (5 * within)) if source.random() < 0.05 else 0.0 for _ in range(20)]
    return [level * math.exp(source.gauss(0, within) + extra) for extra in tail]


def paired(
    source: random.Random, factor: float, cells: int = 1, pairs: int = 5, **noise: float
) -> tuple[Results, Results]:
    sides: list[list[Measurement]] = [[], []]
    for batch in range(1, cells + 1):
        for pair in range(1, pairs + 1):
            for side, scale in zip(sides, (1.0, factor), strict=True):
                one = SessionId(f"{pair}", pair, "AB")
                side.append(row(cell(batch), session(source, scale, **noise), session=one))
    return results(*sides[0]), results(*sides[1])


def verdict(found: Comparison, metric: str = "latency", which: int = 0) -> str:
    return [change.decision.verdict for change in found.changes if change.metric == metric][which]


# -- statistics -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("freedom", [1, 2, 3, 4, 5, 11, 30])
def test_student_is_scipys(freedom: int) -> None:
    from scipy.special import stdtr, stdtrit

    for t in (0.0, 0.1, 1.0, 2.5, 10.0, 300.0):
        assert statistics.student_beyond(t, freedom) == pytest.approx(2 * stdtr(freedom, -t), rel=1e-9)
    for level in (0.5, 0.4, 0.05, 1e-3, 1e-12, 1e-30):
        expected = -stdtrit(freedom, level / 2)
        assert statistics.student_quantile(level, freedom) == pytest.approx(expected, rel=1e-6)


@given(st.lists(st.floats(-1, 1), min_size=2, max_size=12).filter(lambda x: max(x) - min(x) > 1e-6))
def test_the_interval_and_p_are_those_of_the_one_sample_t_test(values: list[float]) -> None:
    from scipy.stats import ttest_1samp

    expected = ttest_1samp(values, 0)
    found = statistics.mean_of(values)
    ends = expected.confidence_interval(0.95)
    assert (found.low, found.high) == (pytest.approx(ends.low, abs=1e-9), pytest.approx(ends.high, abs=1e-9))
    assert found.p == pytest.approx(float(expected.pvalue), abs=1e-9)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=30))
def test_the_adjusted_p_are_scipys(ps: list[float]) -> None:
    from scipy.stats import false_discovery_control

    assert statistics.adjusted(ps) == pytest.approx(list(false_discovery_control(ps)))


def test_differences_without_spread_are_certain() -> None:
    assert statistics.mean_of([0.1, 0.1]).p == 0
    assert statistics.mean_of([0.0, 0.0]).p == 1


@pytest.mark.parametrize(
    ("worse", "low", "high", "expected"),
    [
        (0.03, 0.01, 0.05, "regressed"),
        (0.01, 0.005, 0.015, "equivalent"),
        (0.012, 0.004, 0.02, "inconclusive"),
        (0.03, -0.01, 0.07, "inconclusive"),
        (-0.03, -0.05, -0.01, "improved"),
        (0.0, -0.01, 0.01, "equivalent"),
    ],
)
def test_verdicts_by_interval_and_floor(worse: float, low: float, high: float, expected: str) -> None:
    assert verdict_of(worse, low, high, 0.015) == expected


# -- paired sessions --------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10_000), st.integers(1, 12))
def test_a_run_never_regresses_against_itself(seed: int, cells: int) -> None:
    base, _ = paired(random.Random(seed), 1.0, cells)
    found = compare(base, base)
    assert found.having("equivalent") == sorted(found.changes, key=lambda c: -c.decision.worse)
    assert exit_code(found, strict=True) == 0


def test_equal_code_is_rarely_called_regressed() -> None:
    """300 A/A comparisons on a quiet device: about 1 % expected by the study behind the rules, 3 % is refused."""
    source = random.Random(7)
    alarms = sum(exit_code(compare(*paired(source, 1.0))) for _ in range(300))
    assert alarms <= 9


def test_fifty_cells_of_equal_code_keep_quiet() -> None:
    source = random.Random(8)
    alarms = sum(exit_code(compare(*paired(source, 1.0, cells=50))) for _ in range(10))
    assert alarms <= 2


@pytest.mark.parametrize(("factor", "expected", "code"), [(1.1, "regressed", 1), (0.9, "improved", 0)])
def test_a_planted_ten_percent_is_found(factor: float, expected: str, code: int) -> None:
    source = random.Random(3)
    for _ in range(20):
        found = compare(*paired(source, factor))
        for metric in ("latency", "throughput", "first-token", "per-token"):
            assert verdict(found, metric) == expected
        assert exit_code(found) == code
        change = next(change for change in found.changes if change.metric == "latency")
        assert change.decision.pairs == 5
        assert change.decision.ratio == pytest.approx(factor, rel=0.03)
        assert 0.015 <= (change.decision.detectable or 0) < 0.1


def test_three_percent_is_found_nearly_always_on_a_quiet_device() -> None:
    source = random.Random(5)
    hits = sum(verdict(compare(*paired(source, 1.03, pairs=12))) == "regressed" for _ in range(50))
    assert hits >= 45


def test_one_true_effect_among_fifty_cells_must_clear_the_false_discovery_rate() -> None:
    """A p of 0.03 alone regresses; beside 49 cells without effect it does not, and the reason says so."""
    logs = [0.02, 0.05, 0.03, 0.09, 0.01]
    alone = [[], []], [[], []]
    for sides, quiet in zip(alone, (0, 49), strict=True):
        for batch in range(1, quiet + 2):
            for pair, log in enumerate(logs, 1):
                jitter = log if batch == 1 else 0.001 * (-1) ** (pair + batch) * pair
                for side, value in zip(sides, (0.05, 0.05 * math.exp(jitter)), strict=True):
                    side.append(row(cell(batch), [value] * 20, session=SessionId(str(pair), pair)))
    one, many = (compare(results(*base), results(*head)) for base, head in alone)
    assert verdict(one) == "regressed"
    assert verdict(many) == "inconclusive"
    change = next(change for change in many.changes if change.metric == "latency")
    assert "among 50 cells" in (change.decision.reason or "")
    first = next(change for change in one.changes if change.metric == "latency")
    assert (change.decision.detectable or 0) > (first.decision.detectable or 0)


def test_sessions_are_matched_by_pair_number_whatever_their_order() -> None:
    """Levels differ tenfold between pairs, the effect is 10 % in each: only the right matching finds it."""
    base = [row(cell(), [10.0**k] * 20, session=SessionId("a", k + 1)) for k in range(5)]
    head = [row(cell(), [1.1 * 10.0**k * (1 + k / 1e4)] * 20, session=SessionId("b", k + 1)) for k in range(5)]
    found = compare(results(*base), results(*reversed(head)))
    assert verdict(found) == "regressed"
    assert found.changes[0].decision.ratio == pytest.approx(1.1, rel=1e-3)


def test_the_pooled_ratio_is_the_geometric_mean_over_cells() -> None:
    base = results(*(row(cell(b), [1.0] * 20) for b in (1, 2)))
    head = results(row(cell(1), [2.0] * 20), row(cell(2), [8.0] * 20))
    found = compare(base, head)
    pooled = {(one.subject, one.metric): one for one in found.pooled}
    assert pooled["m", "latency"].ratio == pytest.approx(4.0)
    assert pooled["m", "throughput"].ratio == pytest.approx(0.25)
    assert pooled["m", "latency"].cells == 2


def test_the_pooled_ratio_is_judged_pair_by_pair() -> None:
    """Cells of one session share its noise: twenty cells that move together are no twenty witnesses."""
    source = random.Random(4)
    levels = [source.lognormvariate(0, 0.02) for _ in range(5)]
    sides: list[list[Measurement]] = [[], []]
    for batch in range(1, 21):
        for pair, level in enumerate(levels, 1):
            for side, scale in zip(sides, (1.0, level), strict=True):
                side.append(row(cell(batch), [scale * (1 + batch / 1e6)] * 20, session=SessionId(str(pair), pair)))
    pooled = next(one for one in compare(results(*sides[0]), results(*sides[1])).pooled if one.metric == "latency")
    expected = statistics.mean_of([math.log(level) for level in levels])
    assert pooled.decision is not None
    assert pooled.decision.pairs == 5
    assert pooled.ratio == pytest.approx(math.exp(expected.value))
    assert pooled.decision.low == pytest.approx(math.exp(expected.low), rel=1e-4)
    assert pooled.decision.p == pytest.approx(expected.p, rel=1e-2)


def test_more_than_five_pairs_pay_for_the_looks_in_between() -> None:
    """The same spread and mean: at 12 pairs that may have been looked at 8 times, the interval is wider than t's."""
    logs = [0.02 + 0.01 * (-1) ** k for k in range(12)]
    base, head = (
        results(
            *(row(cell(), [math.exp(sign * log)] * 20, session=SessionId(str(k), k)) for k, log in enumerate(logs, 1))
        )
        for sign in (0, 1)
    )
    decision = compare(base, head).changes[0].decision
    plain = statistics.mean_of(logs)
    assert math.log(decision.low or 0) < plain.low
    assert (decision.p or 0) > 1.1 * plain.p
    assert decision.verdict == "regressed"


def test_the_detectable_effect_is_found_in_four_of_five_experiments() -> None:
    """Of this very spread, on a quiet device, at 5 pairs."""
    source = random.Random(9)
    spread = math.sqrt(2 * 0.01**2 + 2 * (1.25 * 0.005) ** 2 / 20)
    least = statistics.detectable(spread / math.sqrt(5), 5, math.log(1.015))
    found = [verdict(compare(*paired(source, math.exp(least)))) == "regressed" for _ in range(400)]
    assert 0.72 < sum(found) / 400 < 0.9


# -- single sessions --------------------------------------------------------------------------------------------------


@given(st.floats(0.5, 2))
def test_one_session_is_inconclusive_whatever_it_says(factor: float) -> None:
    found = compare(results(row(cell(), [1.0] * 20)), results(row(cell(), [factor] * 20)))
    assert {change.decision.verdict for change in found.changes} == {"inconclusive"}
    assert exit_code(found) == 0
    assert exit_code(found, strict=True) == 3


@pytest.mark.parametrize(
    ("factor", "limits", "code"),
    [
        (1.09, {"latency": 0.05}, 1),
        (1.07, {"latency": 0.05}, 0),  # within the limit and the 3 % of noise between sessions
        (0.5, {"latency": 0.05}, 0),
        (1.5, {"throughput": 0.6}, 0),
        (1.5, {"first-token": 0.05, "latency": 1.0}, 1),
    ],
)
def test_a_limit_decides_a_single_session_with_the_noise_on_top(
    factor: float, limits: dict[str, float], code: int
) -> None:
    found = compare(results(row(cell(), [1.0] * 20)), results(row(cell(), [factor] * 20)), limits)
    assert exit_code(found) == code


def test_the_stored_noise_of_the_machine_is_used() -> None:
    noisy = environment({"device": "noisy"}, {"noise_between_sessions": 0.2})
    rows = [row(cell(), [value] * 20, environment=noisy.id) for value in (1.0, 1.2)]
    base, head = (results(one, environments=[noisy]) for one in rows)
    assert exit_code(compare(base, head, {"latency": 0.05})) == 0


def test_an_unstable_session_decides_nothing() -> None:
    source = random.Random(0)
    base, head = paired(source, 1.2)
    shaken = tuple(msgspec.structs.replace(one, outcome="unstable") for one in head.measurements)
    found = compare(base, results(*shaken))
    assert verdict(found) == "inconclusive"
    assert exit_code(found) == 0


# -- exact metrics ----------------------------------------------------------------------------------------------------


EXACT = {
    "parameters": lambda value: {"parameters": value},
    "decode-bytes": lambda value: {"bounds": Bounds(value, 1)},
    "analytic-memory": lambda value: {"memory": Memory(analytic=value)},
    "ops-per-token": lambda value: {"bounds": Bounds(1, 1, ops_per_token={"mm": value - 7, "add": 7})},
}


@pytest.mark.parametrize("metric", EXACT)
@given(before=st.integers(8, 10**12), after=st.integers(8, 10**12))
def test_exact_metrics_gate_without_statistics(metric: str, before: int, after: int) -> None:
    base, head = (results(row(cell(), **EXACT[metric](value))) for value in (before, after))
    found = compare(base, head)
    expected = "equivalent" if before == after else "regressed" if after > before else "improved"
    assert verdict(found, metric) == expected
    assert exit_code(found) == (expected == "regressed")


@pytest.mark.parametrize(("grown", "expected"), [(2 << 20, "equivalent"), ((2 << 20) + 1, "regressed")])
def test_peak_memory_has_the_granularity_of_an_allocator(grown: int, expected: str) -> None:
    base, head = (results(row(cell(), memory=Memory(allocated=value))) for value in (10 << 20, (10 << 20) + grown))
    assert verdict(compare(base, head), "peak-memory") == expected


@pytest.mark.parametrize("after", [127, 129])
def test_any_other_number_of_tokens_is_a_regression(after: int) -> None:
    base, head = (results(row(cell(), [1.0] * 6, tokens=value)) for value in (128, after))
    assert verdict(compare(base, head), "tokens") == "regressed"


@pytest.mark.parametrize(
    ("before", "after", "expected", "code"),
    [
        ("ok", "oom", "regressed", 1),
        ("ok", "failed", "regressed", 1),
        ("ok", "timed-out", "regressed", 1),
        ("oom", "ok", "improved", 0),
        ("oom", "oom-implied", "equivalent", 0),
        ("ok", "skipped", "inconclusive", 0),
    ],
)
def test_outcomes(before: str, after: str, expected: str, code: int) -> None:
    base, head = (results(row(cell(), outcome=value)) for value in (before, after))
    found = compare(base, head)
    assert [(one.metric, one.decision.verdict) for one in found.changes] == [("outcome", expected)]
    assert exit_code(found) == code


def test_the_largest_batch_gates_exactly() -> None:
    shared = row(cell(), [1.0] * 6)
    group = cell().group
    sides = [results(shared, frontiers=[Frontier(group, HERE.id, size, False)]) for size in (100, 99)]
    found = compare(*sides)
    assert verdict(found, "largest-batch") == "regressed"
    assert exit_code(found) == 1
    assert exit_code(compare(*reversed(sides))) == 0
    assert exit_code(compare(*sides, {"largest-batch": 0.02})) == 0


def ends(size: int | None, *, fails: tuple[int, ...] = (), **more: Any) -> Results:
    """A run that holds a largest batch alone, as `oom` writes it."""
    fits = (size,) if size else ()
    return results(frontiers=[Frontier(cell().group, HERE.id, size, False, fits=fits, fails=fails, **more)])


@pytest.mark.parametrize(
    ("base", "head", "expected"),
    [
        (ends(64, fails=(65,)), ends(63, fails=(64,)), "regressed"),
        (ends(64, fails=(65,)), ends(65, fails=(66,)), "improved"),
        (ends(64), ends(63, fails=(64,)), "regressed"),  # at least 64 before
        (ends(64, fails=(65,)), ends(32), "inconclusive"),  # 32 is only how far the head's suite went
        (ends(32), ends(64), "inconclusive"),
        (ends(32, fails=(33,)), ends(64), "improved"),
        (ends(32), ends(32), "equivalent"),
        (ends(32, fails=(33,)), ends(None, reason="no cell was measured"), "inconclusive"),
        (ends(32, fails=(33,)), ends(16, fails=(17,), non_monotone=True), "inconclusive"),
    ],
)
def test_largest_batches_decide_where_both_ends_were_met(base: Results, head: Results, expected: str) -> None:
    found = compare(base, head)
    assert verdict(found, "largest-batch") == expected
    assert exit_code(found) == (expected == "regressed")


def test_an_implied_end_of_memory_is_an_end() -> None:
    implied = row(cell(64), outcome="oom-implied")
    frontier = Frontier(cell().group, HERE.id, 32, False, fits=(32,))
    base = ends(48, fails=(49,))
    base = msgspec.structs.replace(base, measurements=(implied,))
    assert verdict(compare(base, results(implied, frontiers=[frontier])), "largest-batch") == "regressed"


def test_largest_batches_of_other_machines_end_with_exit_code_3() -> None:
    other = results(frontiers=[Frontier(cell().group, THERE.id, 10, False)])
    found = compare(ends(64), other)
    assert (found.changes, exit_code(found)) == ((), 3)


def test_simulated_and_measured_largest_batches_are_not_mixed() -> None:
    other = results(frontiers=[Frontier(cell().group, HERE.id, 10, True)])
    with pytest.raises(IncomparableError, match="simulated on one side"):
        compare(ends(64), other)


@pytest.mark.parametrize("absent", [None, "unknown", 0])
def test_energy_is_judged_like_a_time_where_both_sides_have_it(absent: object) -> None:
    def run(joules: object, factor: float) -> Results:
        scaled = [joules * factor if isinstance(joules, float) else joules] * 5
        rows = [
            row(cell(), [1.0] * 20, session=SessionId(str(k), k), telemetry={"joules_per_token": one * (1 + k / 1e4)})
            if isinstance(one, float)
            else row(cell(), [1.0] * 20, session=SessionId(str(k), k), telemetry={"joules_per_token": one})
            for k, one in enumerate(scaled, 1)
        ]
        return results(*rows)

    assert verdict(compare(run(2.0, 1.0), run(2.0, 1.1)), "energy") == "regressed"
    metrics = {change.metric for change in compare(run(2.0, 1.0), run(absent, 1.0)).changes}
    assert "energy" not in metrics
    assert "latency" in metrics


@pytest.mark.parametrize(("simulated", "compared"), [(True, 1), (False, 0)])
def test_largest_batches_of_two_machines_are_compared_only_if_simulated(simulated: bool, compared: int) -> None:
    shared = row(cell(), [1.0] * 6, simulated=simulated)
    sides = [
        results(shared, frontiers=[Frontier(cell().group, where.id, size, simulated)])
        for where, size in ((HERE, 100), (THERE, 99))
    ]
    assert sum(change.metric == "largest-batch" for change in compare(*sides).changes) == compared


# -- simulated rows ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("factor", "code"), [(1.0, 0), (1.000001, 0), (1.0001, 1), (0.9, 0)])
def test_simulated_rows_are_exact_and_always_decide_on_any_machine(factor: float, code: int) -> None:
    one = cell(runtime="roofline")
    base = results(row(one, [1.0] * 10, simulated=True))
    head = results(row(one, [factor] * 10, simulated=True, environment=THERE.id))
    found = compare(base, head)
    assert (exit_code(found), found.simulated, found.differing) == (code, 1, ())
    assert not found.having("inconclusive")


def test_simulated_and_measured_rows_are_not_mixed() -> None:
    base, head = (results(row(cell(), [1.0] * 10, simulated=value)) for value in (True, False))
    with pytest.raises(IncomparableError, match="simulated on one side"):
        compare(base, head)


# -- other machines ---------------------------------------------------------------------------------------------------


def two_machines(pruned_s: float) -> tuple[Results, Results]:
    """The head's machine is twice as fast; the pruned model takes `pruned_s` there."""
    dense, pruned = cell(), cell(subject="m/depth:3")
    base = results(row(dense, [1.0] * 10), row(pruned, [0.5] * 10))
    head = results(row(dense, [0.5] * 10, environment=THERE.id), row(pruned, [pruned_s] * 10, environment=THERE.id))
    return base, head


def test_times_of_two_machines_are_not_compared_and_the_fields_are_named() -> None:
    found = compare(*two_machines(0.25))
    assert found.differing == ("device: x -> y",)
    assert verdict(found) == "incomparable"
    assert exit_code(found) == 3
    assert exit_code(found, strict=True) == 3


@pytest.mark.parametrize(("pruned_s", "expected"), [(0.25, "inconclusive"), (0.5, "regressed"), (0.26, "inconclusive")])
def test_speed_ups_over_the_dense_subject_carry_over(pruned_s: float, expected: str) -> None:
    found = compare(*two_machines(pruned_s), {"speed-up": 0.05})
    change = next(change for change in found.changes if change.metric == "speed-up")
    assert (change.decision.base, change.decision.head) == (pytest.approx(2.0), pytest.approx(0.5 / pruned_s))
    assert change.decision.verdict == expected


def test_the_dense_subject_is_the_nearest_parent_by_name() -> None:
    names = ("a", "a/b", "a/b/ppl:0.5", "ab/c")
    assert dense_of("a/b/ppl:0.5", names) == "a/b"
    assert dense_of("a/b", names) == "a"
    assert dense_of("ab/c", names) is None
    assert dense_of("a", names) is None


# -- bad input --------------------------------------------------------------------------------------------------------


def test_files_without_a_common_cell_are_refused() -> None:
    with pytest.raises(InputError, match="no cell in common"):
        compare(results(row(cell(1))), results(row(cell(2))))


@pytest.mark.parametrize("value", [-1.0, 0.0])
def test_a_time_that_is_not_positive_is_refused(value: float) -> None:
    with pytest.raises(InputError, match=f"has a sample of {value} s"):
        compare(results(row(cell(), [1.0, value])), results(row(cell(), [1.0])))


def test_cells_of_one_side_are_counted() -> None:
    found = compare(results(row(cell(1)), row(cell(2))), results(row(cell(2)), row(cell(3)), row(cell(4))))
    assert (found.cells, found.base_only, found.head_only) == (1, 1, 2)


@pytest.mark.parametrize("text", ["latencies:5%", "latency", "latency:", "latency:-1%", "latency:nan", "latency:inf%"])
def test_a_limit_that_is_not_understood_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="--fail-over"):
        limits_of([text])


def test_limits_are_percentages() -> None:
    assert limits_of(["latency:5%", "throughput:2.5"]) == {"latency": 0.05, "throughput": 0.025}


# -- the verb ---------------------------------------------------------------------------------------------------------


def save(path: Path, run: Results) -> Path:
    with store.Writer(path) as writer:
        for one in run.environments.values():
            writer.write(one)
        for one in (*run.measurements, *run.frontiers):
            writer.write(one)
    return path


def call(*arguments: object) -> int:
    app = typer.Typer()
    app.command()(verb)
    return console.run(app, [str(one) for one in arguments])


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    base, head = paired(random.Random(0), 1.1, cells=2)
    return save(tmp_path / "base.jsonl", base), save(tmp_path / "head.jsonl", head)


def test_the_verb_returns_the_exit_code_and_writes_what_it_is_asked(
    files: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = tmp_path / "table.md"
    assert call(*files, "--markdown", table) == 1
    text = capsys.readouterr().out
    assert text.startswith("2 cells: 8 regressed")
    assert "detectable from" in text
    assert table.read_text().count("| regressed |") == 8
    assert call(*files, "--json") == 1
    document = json.loads(capsys.readouterr().out)
    assert document["exit_code"] == 1
    assert document["comparison"]["cells"] == 2
    assert call(*files, "--fail-over", "latency:20%") == 0
    assert call(files[0], files[0], "--strict") == 0


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("missing.jsonl", "missing.jsonl"), "cannot be read"),
        (("BASE", "HEAD", "--fail-over", "speed:5%"), "no metric 'speed'"),
        (("BASE",), "HEAD"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    files: tuple[Path, Path], arguments: tuple[str, ...], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    named = {"BASE": files[0], "HEAD": files[1]}
    assert call(*(named.get(one, one) for one in arguments)) == 2
    message = capsys.readouterr().err
    assert expected in message
    assert message.count("\n") == 1


def test_comparing_imports_nothing_heavy(files: tuple[Path, Path]) -> None:
    code = f"""
import sys, typer
from bench.compare import compare
from shortllama import console
app = typer.Typer()
app.command()(compare)
assert console.run(app, [{str(files[0])!r}, {str(files[1])!r}, "--json"]) == 1
heavy = {{"torch", "transformers", "numpy", "scipy", "matplotlib"}} & set(sys.modules)
assert not heavy, heavy
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60, stdout=subprocess.DEVNULL)


def test_hostile_names_stay_in_their_table_cell() -> None:
    name = "m|`<script>\n# x"
    base, head = (results(row(cell(subject=name), [value] * 20, simulated=True)) for value in (1.0, 2.0))
    text = comparison_text.markdown(compare(base, head))
    lines = [line for line in text.splitlines() if line.startswith("| regressed")]
    assert len(lines) == 4
    assert "<script>" not in text
    assert all(line.replace("\\|", "").count("|") == 9 for line in lines)


def test_the_markdown_is_bounded_and_says_what_it_leaves_out() -> None:
    base, head = (results(*(row(cell(b), [x] * 20) for b in range(1, 200))) for x in (1.0, 2.0))
    text = comparison_text.markdown(compare(base, head))
    assert len(text) < 20_000
    assert f"... and {199 * 4 - comparison_text.MOST_ROWS} more." in text
