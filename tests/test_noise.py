"""The machine's noise: estimated from sessions of equal code, kept per fingerprint, carried by every run."""

from __future__ import annotations

import math
import random
from pathlib import Path

import pytest

from bench import environment, noise
from bench.comparison import compare, exit_code
from bench.noise import Noise, session_noise
from shortllama.errors import InputError
from tests.test_comparison import HERE, cell, results, row, session


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    return tmp_path / "state" / "shortllama" / "noise.json"


def sessions(count: int, cells: int, between: float, within: float) -> list:
    source = random.Random(1)
    return [
        row(cell(batch), [math.exp(level + source.gauss(0, within)) for _ in range(20)])
        for batch in range(1, cells + 1)
        for level in (source.gauss(batch, between) for _ in range(count))
    ]


def test_the_noise_is_that_of_the_sessions() -> None:
    found = session_noise(sessions(30, 20, between=0.02, within=0.004))
    assert found.between == pytest.approx(0.02, rel=0.1)
    assert found.within == pytest.approx(0.004, rel=0.05)
    assert (found.sessions, found.cells) == (30, 20)


def test_the_allowance_holds_for_95_of_100_pairs_of_sessions() -> None:
    source = random.Random(2)
    limit = math.log1p(Noise(0.01, 0.0, 2, 1).allowance)
    within = sum(abs(source.gauss(0, 0.01) - source.gauss(0, 0.01)) < limit for _ in range(4000)) / 4000
    assert within == pytest.approx(0.95, abs=0.01)


@pytest.mark.parametrize(
    "rows",
    [
        [],
        [row(cell(), [1.0] * 20)],
        [row(cell(1), [1.0] * 20), row(cell(2), [1.0] * 20)],
        [row(cell(), [1.0] * 20), row(cell(), outcome="oom")],
        [row(cell(), [1.0]), row(cell(), [1.0])],
    ],
)
def test_one_session_says_nothing_about_the_noise_between_sessions(rows: list) -> None:
    with pytest.raises(InputError, match="at least two sessions"):
        session_noise(rows)


def test_it_is_kept_by_fingerprint(state: Path) -> None:
    first, second = Noise(0.01, 0.005, 10, 4), Noise(0.03, 0.02, 10, 4)
    assert noise.facts("one") == {}
    assert noise.remember("one", first) == state
    noise.remember("two", second)
    noise.remember("one", second)
    noise.remember("one", first)
    assert noise.facts("one") == {"noise_between_sessions": first.allowance, "noise_within_session": 0.005}
    assert noise.facts("two")["noise_between_sessions"] == second.allowance
    assert noise.facts("three") == {}


def test_a_broken_file_is_named_with_the_way_out(state: Path) -> None:
    state.parent.mkdir(parents=True)
    state.write_text('{"schema": "shortllama.noise/1", "machines": {"one": {"between": "x"}}}')
    with pytest.raises(InputError, match=r"noise\.json.*delete it"):
        noise.facts("one")


def test_a_run_carries_its_machines_noise_to_where_it_is_compared() -> None:
    here = environment.machine("cpu")
    bare = environment.measured(here, 1)
    assert noise.BETWEEN_FACT not in bare.facts
    noise.remember(bare.id, Noise(0.05, 0.01, 10, 4))
    where = environment.measured(here, 1)
    assert where.id == bare.id
    assert where.facts[noise.BETWEEN_FACT] == pytest.approx(math.expm1(1.959964 * math.sqrt(2) * 0.05))
    source = random.Random(0)
    base, head = (
        results(row(cell(), session(source, factor, between=0), environment=where.id), environments=[where])
        for factor in (1.0, 1.12)
    )
    assert exit_code(compare(base, head, {"latency": 0.05})) == 0
    quiet = results(row(cell(), [1.0] * 20)), results(row(cell(), [1.12] * 20))
    assert HERE.facts == {}
    assert exit_code(compare(*quiet, {"latency": 0.05})) == 1
