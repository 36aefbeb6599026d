"""Factors fitted to planted times are found again; the solver is held against scipy's; held-out errors are real."""

from __future__ import annotations

import math
import random

import msgspec
import numpy
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import nnls

from bench import devices, fitting, prediction
from bench.cells import Cell
from bench.fitting import Observed
from bench.measurement import Measurement, Samples, SessionId
from bench.prediction import Overheads
from shortllama import catalogue

H100 = devices.lookup("h100")
SUBJECTS = ("llama-7b", "llama-7b/depth-26", "llama-7b/depth-21", "llama-13b")


def cells(
    truth: Overheads, noise: float = 0.0, runtime: str = "eager", subjects=SUBJECTS, seed: int = 0
) -> list[Observed]:
    source = random.Random(seed)
    found = []
    for subject in subjects:
        for batch in (1, 4, 64, 512):
            for output in (16, 128):
                cell = Cell(subject, runtime, "float16", "sdpa", 12, output, "none", batch)
                shape = catalogue.lookup(subject)
                call = prediction.call_s(shape, cell, H100, truth) * math.exp(source.gauss(0, noise))
                found.append(Observed(shape, cell, call))
    return found


@pytest.mark.parametrize(
    "truth",
    [Overheads(0.7, 4e-4, 1e-3), Overheads(0.9, 0.0, 0.0), Overheads(1.0, 1e-3, 0.0), Overheads(0.5, 0.0, 2e-3)],
)
def test_planted_factors_are_found_again(truth: Overheads) -> None:
    found = fitting.calibrate(cells(truth), H100)[("eager", "float16")]
    assert found.efficiency == pytest.approx(truth.efficiency, rel=1e-6)
    assert found.block_s == pytest.approx(truth.block_s, rel=1e-5, abs=1e-9)
    assert found.step_s == pytest.approx(truth.step_s, rel=1e-4, abs=1e-7)


def test_noise_moves_factors_by_little_and_errors_say_how_much() -> None:
    truth = Overheads(0.7, 4e-4, 1e-3)
    noisy = cells(truth, noise=0.02)
    found = fitting.calibrate(noisy, H100)
    assert found[("eager", "float16")].efficiency == pytest.approx(0.7, rel=0.03)
    unseen = fitting.held_out(noisy, H100)
    assert unseen is not None
    assert 1.005 < unseen.typical < 1.04
    assert unseen.cells == len(noisy)
    shipped = fitting.error(noisy, H100)
    assert shipped is not None
    assert shipped.typical > 1.5
    assert shipped.bias < 1, "the shipped row is faster than these cells"


def test_the_fit_is_least_in_log_error() -> None:
    """No factor can be moved by 1 % to fit better."""
    noisy = cells(Overheads(0.7, 4e-4, 1e-3), noise=0.1)
    best = fitting.calibrate(noisy, H100)[("eager", "float16")]

    def loss(one: Overheads) -> float:
        return sum(math.log(prediction.call_s(o.shape, o.cell, H100, one) / o.call_s) ** 2 for o in noisy)

    for name in ("efficiency", "block_s", "step_s"):
        for factor in (0.99, 1.01):
            assert loss(msgspec.structs.replace(best, **{name: getattr(best, name) * factor})) >= loss(best)


def test_nothing_is_faster_than_a_real_roof_and_anything_than_a_nominal_one() -> None:
    fast = [msgspec.structs.replace(one, call_s=one.call_s / 3) for one in cells(Overheads(1.0, 0.0, 0.0))]
    assert fitting.calibrate(fast, H100)[("eager", "float16")] == Overheads(1.0, 0.0, 0.0)
    nominal = msgspec.structs.replace(H100, nominal=True)
    assert fitting.calibrate(fast, nominal)[("eager", "float16")].efficiency == pytest.approx(3)


def test_one_depth_cannot_tell_blocks_from_steps() -> None:
    found = fitting.calibrate(cells(Overheads(0.8, 1e-4, 3.2e-3), subjects=("llama-7b",)), H100)[("eager", "float16")]
    assert (found.block_s, found.step_s) == (pytest.approx(2e-4, rel=1e-5), 0.0)


def test_runtimes_are_fitted_apart_and_too_few_cells_not_at_all() -> None:
    both = cells(Overheads(0.5, 1e-3, 0.0)) + cells(Overheads(0.9, 0.0, 0.0), runtime="cudagraph")
    found = fitting.calibrate(both, H100)
    assert found[("eager", "float16")].efficiency == pytest.approx(0.5)
    assert found[("cudagraph", "float16")].efficiency == pytest.approx(0.9)
    assert fitting.calibrate(both[:2], H100) == {}
    assert fitting.held_out(both[:5], H100) is not None, "three cells and two: one half is enough to be fitted on"
    assert fitting.held_out(both[:4], H100) is None
    assert fitting.error(both, H100, {}) is None
    unknown = msgspec.structs.replace(H100, flops={})
    assert (fitting.calibrate(both, unknown), fitting.error(both, unknown)) == ({}, None)


@given(st.integers(0, 10**6), st.integers(3, 12))
def test_the_solver_agrees_with_scipy(seed: int, count: int) -> None:
    source = random.Random(seed)
    rows = [[source.uniform(0, 1) for _ in range(3)] for _ in range(count)]
    wanted = [source.uniform(-1, 1) for _ in range(count)]
    mine = fitting._solve(rows, wanted, (0.0, 0.0, 0.0))
    theirs, _ = nnls(numpy.array(rows), numpy.array(wanted))
    assert mine == pytest.approx(theirs, abs=1e-6)


def test_no_cell_is_tested_that_was_fitted_on() -> None:
    """A cell ten times as slow as the law of the others is missed by as much: no fit that it is judged by saw it."""
    lawful = cells(Overheads(0.7, 4e-4, 1e-3))
    for place in range(0, len(lawful), 5):
        odd = msgspec.structs.replace(lawful[place], call_s=10 * lawful[place].call_s)
        unseen = fitting.held_out([*lawful[:place], odd, *lawful[place + 1 :]], H100)
        assert unseen is not None
        assert unseen.worst == pytest.approx(10, rel=1e-4)


def test_sessions_of_a_cell_count_once_and_simulated_rows_not() -> None:
    shape = catalogue.lookup("llama-7b")
    cell = Cell("llama-7b", "eager", "float16", "sdpa", 12, 16, "none", 1)

    def row(call: float, **more: object) -> Measurement:
        one = Measurement(cell, cell.id, "e", "ok", False, SessionId("s"), samples=Samples((call,) * 7))
        return msgspec.structs.replace(one, **more)  # pyright: ignore

    rows = [row(1.0), row(2.0), row(4.0), row(9.0, simulated=True), row(9.0, outcome="unstable")]
    assert fitting.observed(rows, {"llama-7b": shape}) == (Observed(shape, cell, 2.0),)
    assert fitting.observed(rows, {}) == ()
