"""The study of the gate: its noise is the one described, its figures count what they say, its plant is in place."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from bench import ab, gate_simulation, gate_study, sides
from bench.comparison import Change, Comparison
from bench.gate_report import SLOWDOWN, Real, Study, Trial, Verdict, limits, readme, upper_bound
from bench.gate_simulation import AB, FILES, FIVE, NOISY, QUIET, TWELVE, many, single
from bench.measurement import environment
from bench.verdicts import Decision
from shortllama import files


def test_the_noise_is_the_one_described() -> None:
    source = np.random.default_rng(0)
    for noise in (QUIET, NOISY):
        logs = gate_simulation.log_ratios(noise, (4000, 12), source)
        # The median of 20 normal samples has 1.25 times the error of their mean; a few stretched ones move it little.
        expected = math.sqrt(2 * (noise.between**2 + (1.25 * noise.within) ** 2 / gate_simulation.SAMPLES))
        assert float(logs.std()) == pytest.approx(expected, rel=0.05)
        assert abs(float(logs.mean())) < 4 * expected / math.sqrt(logs.size)
    drifting = gate_simulation.log_ratios(gate_simulation.DRIFTING[0], (4000, 12), source)
    assert drifting[:, 0::2].mean() == pytest.approx(0.003, abs=0.0005)
    assert drifting[:, 1::2].mean() == pytest.approx(-0.003, abs=0.0005)


@pytest.mark.parametrize(
    ("noise", "design", "limit"),
    [(QUIET, AB, 0.015), (NOISY, AB, 0.05), (QUIET, FILES, 0.015), (NOISY, FILES, 0.06), (QUIET, FIVE, 0.02)],
)
def test_equal_code_is_flagged_rarely(noise: Any, design: Any, limit: float) -> None:
    assert single(noise, design, 0.0, trials=1500, seed=3).regressed <= limit


def test_three_percent_is_found_on_a_quiet_device() -> None:
    assert single(QUIET, AB, 0.03, trials=400, seed=4).regressed >= 0.98
    assert single(QUIET, FIVE, 0.03, trials=400, seed=4).regressed >= 0.85


def test_one_effect_among_fifty_cells_needs_more_than_five_pairs() -> None:
    five, grown, twelve = (many(QUIET, design, 0.03, 50, 40, seed=5) for design in (FIVE, AB, TWELVE))
    assert (five.power or 0) < 0.4
    assert (grown.power or 0) > 0.85
    assert (twelve.power or 0) > 0.85
    assert max(one.false_discovery_rate for one in (grown, twelve)) < 0.12
    assert 5 < grown.pairs < 12


def test_without_an_effect_there_is_no_power() -> None:
    found = many(QUIET, FIVE, 0.0, 10, 20, seed=6)
    assert found.power is None
    assert found.false_discovery_rate >= found.alarms / 2


@pytest.mark.parametrize(
    ("count", "trials", "expected"), [(0, 200, 1 - 0.05 ** (1 / 200)), (1, 20, 0.2161), (20, 20, 1.0)]
)
def test_the_bound_is_clopper_and_pearsons(count: int, trials: int, expected: float) -> None:
    assert upper_bound(count, trials) == pytest.approx(expected, abs=1e-4)


# -- the plant --------------------------------------------------------------------------------------------------------


def test_the_plant_spins_for_its_share_of_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]

    def clock() -> float:
        now[0] += 1e-5
        return now[0]

    class Loop:
        def _step(self, cache: object, ids: object, positions: object) -> tuple[object, ...]:
            now[0] += 1.0
            return cache, ids, positions

    monkeypatch.setattr("time.perf_counter", clock)
    exec(gate_study.SPIN, {"Loop": Loop})
    assert Loop()._step(1, 2, 3) == (1, 2, 3)
    assert now[0] == pytest.approx(1 + SLOWDOWN, abs=1e-3)


def test_the_copies_are_the_sources_and_the_plant_is_in_the_loop_that_runtimes_use() -> None:
    with gate_study.copied("") as plain, gate_study.copied(gate_study.SPIN) as planted:
        digests = [sides._tree(tree).digest for tree in (sides.HERE, plain, planted)]
        assert digests[0] == digests[1] != digests[2]
        text = (planted / "bench" / "runtimes" / "loop.py").read_text()
        assert text.endswith(gate_study.SPIN)
        assert "    def _step(self, cache: Cache, ids: torch.Tensor, positions: torch.Tensor)" in text
        trees = [plain, planted]
    assert not any(tree.exists() for tree in trees)


# -- the study --------------------------------------------------------------------------------------------------------


def comparison(verdict: str) -> Comparison:
    decision = Decision(verdict, 1.0, 1.1, 1.1, 1.05, 1.15, 0.1, 5, 0.001, 0.02)
    cells = [Change(str(k), f"cell {k}", "m", "latency", "s", True, decision) for k in range(2)]
    return Comparison(tuple(cells), (), 2, 0, 0, (), 0)


def test_the_study_goes_on_where_it_was_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    asked: list[str] = []

    def measure(base: object, head: object, asked_for: ab.Asked, folder: Path, *, resume: bool) -> Comparison:
        assert resume
        asked.append(folder.name)
        if len(asked) == 3:
            raise KeyboardInterrupt
        return comparison("regressed" if folder.name.startswith("planted") else "inconclusive")

    monkeypatch.setattr(ab, "measure", measure)
    out = tmp_path / "reports" / "study"
    with pytest.raises(KeyboardInterrupt):
        gate_study.study(out, simulated=False, real=True, experiments=2, planted=2, trials=10)
    half = files.decode_json((out / "results.json").read_bytes(), Study, "results")
    assert half.real is not None
    assert (len(half.real.same), len(half.real.planted)) == (2, 0)
    assert gate_study.study(out, simulated=False, real=True, experiments=2, planted=2, trials=10) == 0
    whole = files.decode_json((out / "results.json").read_bytes(), Study, "results")
    assert whole.real is not None
    assert [one.name for one in whole.real.same] == ["same-01", "same-02"]
    assert [one.name for one in whole.real.planted] == ["planted-01", "planted-02"]
    text = (out / "README.md").read_text()
    assert "| planted 15% found, real | at least 18 of 20 | 2 of 2 | yes |" in text
    assert "| A/A cell comparisons called regressed | 0 of 4 | 0.00% | 52.71% |" in text
    assert "Planted: a spin of 15% in the decode step was found in 2 of 2 experiments; measured, it is +10.0%" in text


def test_a_gate_that_fails_its_limits_says_so() -> None:
    rates, discoveries = gate_study.simulate(10)
    bad = [msgspec.structs.replace(one, regressed=0.5) for one in rates]
    found = Study(tuple(bad), discoveries)
    assert not all(met for _, _, _, met in limits(found))
    assert "| false alarms, quiet device | at most 1.5% | 50.00% | **no** |" in readme(found)


def test_sleeping_through_a_plant_fails() -> None:
    where = environment({"device": "x", "threads": 1, "torch": "2"}, {"date": "2026-01-01", "commit": "abc"})
    cell = Verdict("c", "inconclusive", 1.15, 12, 0.2, 0.3)
    hit = msgspec.structs.replace(cell, verdict="regressed")
    for hits, met in ((17, False), (18, True)):
        trials = tuple(Trial(str(k), False, (hit if k < hits else cell,)) for k in range(20))
        assert limits(Study(real=Real(where, planted=trials)))[-1][3] == met
