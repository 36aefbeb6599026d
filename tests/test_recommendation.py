"""A recommendation is the fastest candidate that meets every limit, and says what it cost to meet them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench import recommendation
from bench.cells import Cell
from bench.recommendation import Candidate, Constraint, front, recommend
from bench.timing import Estimate
from shortllama import console

ROOT = Path(__file__).parent.parent
RUN = next(ROOT.glob("reports/quick_*/run"))


def candidate(
    subject: str, call_s: float, memory: int | None = 10, ppl: float | None = None, batch: int = 1, spread: float = 0.01
) -> Candidate:
    cell = Cell(subject, "eager", "float16", "sdpa", 12, 128, "none", batch)
    rate = batch * 128 / call_s
    ends = [Estimate(value, value * (1 - spread), value * (1 + spread), 20) for value in (call_s, rate)]
    return Candidate(cell, "measured on X", ends[0], ends[1], memory, ppl)


DENSE, DEPTH, WIDTH = (
    candidate("dense", 3.0, 14, 8.0), candidate("depth", 2.0, 10, 12.0), candidate("width", 2.5, 9, 9.0),
)  # fmt: skip
ALL = [DENSE, DEPTH, WIDTH]


def test_without_limits_the_fastest_is_taken() -> None:
    answer = recommend(ALL, [])
    assert (answer.choice, answer.runner_up, answer.binding, answer.margins) == (DEPTH, WIDTH, (), {})
    assert answer.lead == pytest.approx(1.25)
    assert answer.clear is True
    assert recommend([DEPTH, candidate("width", 2.01)], []).clear is False


def test_a_limit_that_costs_speed_binds() -> None:
    quality, memory = Constraint("perplexity", 10.0), Constraint("memory", 20)
    answer = recommend(ALL, [quality, memory])
    assert (answer.choice, answer.runner_up) == (WIDTH, DENSE)
    assert answer.binding == ("perplexity",)
    assert answer.margins == {"perplexity": pytest.approx(0.1), "memory": pytest.approx(0.55)}


def test_where_nothing_fits_the_closest_is_named() -> None:
    answer = recommend(ALL, [Constraint("latency", 1.9), Constraint("perplexity", 9.0)])
    assert (answer.choice, answer.runner_up, answer.lead) == (None, None, None)
    assert answer.closest == WIDTH, "0.6 s over 1.9; the depth-pruned one is a third over in perplexity"
    assert answer.misses == {"latency": pytest.approx(-0.6 / 1.9)}
    assert answer.binding == ("latency",), "without that limit the width-pruned one would do"


def test_what_is_not_known_does_not_meet_a_limit() -> None:
    unknown = candidate("other", 1.0)
    answer = recommend([*ALL, unknown], [Constraint("perplexity", 10.0)])
    assert (answer.choice, answer.unknown) == (WIDTH, {"perplexity": 1})
    assert recommend([unknown], [Constraint("perplexity", 10.0)]).misses == {"perplexity": None}


def test_throughput_is_a_least_and_equal_speed_goes_to_quality_then_memory() -> None:
    assert recommend(ALL, [Constraint("throughput", 60.0)]).choice == DEPTH
    assert recommend(ALL, [Constraint("throughput", 65.0)]).choice is None
    worse, better = candidate("a", 1.0, 5, 9.0), candidate("b", 1.0, 6, 8.0)
    assert recommend([worse, better], []).choice == better
    assert recommend([candidate("a", 1.0, 6), candidate("b", 1.0, 5)], []).choice.memory_bytes == 5  # type: ignore[union-attr]


def test_the_cost_of_a_million_tokens() -> None:
    assert recommendation.cost(1000.0, 3.6) == pytest.approx(1.0)


figures = st.integers(1, 6).map(float)


@given(st.lists(st.tuples(figures, figures, figures), min_size=1, max_size=12))
def test_the_front_is_what_nothing_beats(values: list[tuple[float, float, float]]) -> None:
    every = [candidate(f"s{i}", call, int(size), ppl) for i, (call, size, ppl) in enumerate(values)]
    kept = front(every)

    def beats(a: int, b: int) -> bool:
        pairs = list(zip(values[a], values[b], strict=True))
        return all(x <= y for x, y in pairs) and any(x < y for x, y in pairs)

    expected = {f"s{i}" for i in range(len(every)) if not any(beats(j, i) for j in range(len(every)))}
    assert {one.cell.subject for one in kept} == expected
    rates = [one.throughput.value for one in kept]
    assert rates == sorted(rates, reverse=True)


@given(st.lists(st.tuples(figures, figures), min_size=1, max_size=12), figures)
def test_the_choice_is_the_best_by_brute_force(values: list[tuple[float, float]], limit: float) -> None:
    every = [candidate(f"s{i}", call, int(size)) for i, (call, size) in enumerate(values)]
    answer = recommend(every, [Constraint("memory", limit)])
    fitting = [call for call, size in values if size <= limit]
    assert (answer.choice is None) == (not fitting)
    if answer.choice:
        assert answer.choice.latency_s.value == min(fitting)
        assert (answer.binding == ("memory",)) == (min(call for call, _ in values) < min(fitting))


# -- the command -------------------------------------------------------------------------------------------------------


def test_the_command_explains_its_choice(run_command: Callable) -> None:
    done = run_command("recommend", RUN, "--max-ppl", 10, "--price-per-hour", 2)
    assert done.returncode == 0, done.stderr
    first, origin, limit, *rest = done.stdout.splitlines()
    assert first.startswith("take reference/wanda-sp:0.25 ")
    assert "perplexity 9.30" in first
    assert "cost a million tokens" in first
    assert origin.strip().startswith("measured on ")
    assert "perplexity at most 10.0: 7% to spare, and this limit binds" in limit
    assert any(line.startswith("runner-up reference/mag-sp:0.25 ") for line in rest)


def test_the_answer_is_one_json_document(run_command: Callable) -> None:
    document = json.loads(run_command("recommend", RUN, "--max-memory", "20MiB", "--json").stdout)
    assert document["choice"]["memory_bytes"] <= 20 << 20
    assert document["constraints"] == [{"quantity": "memory", "limit": 20 << 20}]
    assert set(document) == {"constraints", *recommendation.Recommendation.__struct_fields__}


def test_nothing_fits_is_exit_code_1_with_the_closest(run_command: Callable) -> None:
    done = run_command("recommend", RUN, "--max-latency", "1ms")
    assert done.returncode == 1
    assert "meets every limit" in done.stdout
    assert "the limit is 1.00" in done.stdout.replace("\u00a0", " ")


def test_a_device_not_at_hand_is_predicted_and_says_so(run_command: Callable) -> None:
    document = json.loads(run_command("recommend", RUN, "--device", "rtx3090", "--json").stdout)
    assert {one["origin"] for one in document["front"]} == {"predicted for NVIDIA GeForce RTX 3090"}
    assert document["choice"]["latency_s"]["low"] is None


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--batch", "3"], "the runs have batch: 1, 8, 64"),
        (["--device", "rtx3091"], "neither measured"),
        (["--text", "c4"], "no subject was evaluated on it; evaluated: self"),
        (["--max-latency", "fast"], "800ms"),
        (["--max-latency", "0s"], "not a time"),
        (["--max-memory", "2GB"], "24GiB"),
        (["--max-ppl", "-1"], "--max-ppl"),
    ],
)
def test_a_mistake_is_one_line(options: list[str], told: str, capsys: pytest.CaptureFixture) -> None:
    from bench.cli import app

    assert console.run(app, ["recommend", str(RUN), *options]) == 2
    seen = capsys.readouterr()
    assert (seen.out, seen.err.count("\n")) == ("", 1)
    assert told in seen.err


def test_a_candidate_without_memory_or_interval_is_still_one() -> None:
    bare = msgspec.structs.replace(DEPTH, memory_bytes=None, throughput=Estimate(64.0, None, None, 3))
    assert recommend([bare, WIDTH], []).clear is None
