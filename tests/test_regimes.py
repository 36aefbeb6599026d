"""What limits a cell, by planted pairs of rows and planted ceilings: labels have causes, nulls have reasons."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench import devices, peaks, regimes
from bench.cells import Cell
from bench.measurement import Bounds, Environment, Measurement, Samples, SessionId, environment
from bench.peaks import Peaks
from shortllama.errors import InputError

GB = 10**9
STATIC = Cell("m", "static", "float16", "sdpa", 12, 17, "none", 1)
GRAPH = msgspec.structs.replace(STATIC, runtime="cudagraph")
PEAKS = Peaks(1e12, 1e12, {"float16": 1e14}, {"eager": 5e-6}, 50_000_000, 5e12, "2026-01-01")


def machine(kind: str = "cuda", device: str = "NVIDIA H100 80GB HBM3", known: Peaks | None = PEAKS) -> Environment:
    facts = {} if known is None else {peaks.FACT: msgspec.to_builtins(known)}
    return environment({"simulated": False, "kind": kind, "device": device}, facts)


def row(cell: Cell, env: Environment, step: float, moved: int = GB, flops: int = GB, **more: Any) -> Measurement:
    bounds = Bounds(moved, flops, ops_per_token=more.pop("ops", None))
    samples = Samples((16 * step + 0.1,) * 6, (0.1,) * 6, (step,) * 16)
    return Measurement(cell, cell.id, env.id, "ok", False, SessionId("s"), samples=samples, bounds=bounds, **more)


def limits(env: Environment, *rows: Measurement) -> list[regimes.Limits]:
    found = regimes.joined(rows, {env.id: env})
    assert all(one is not None for one in found)
    return [one for one in found if one is not None]


@pytest.mark.parametrize(
    ("launched", "moved", "flops", "regime"),
    [
        (4e-3, GB, GB, "launch"),
        (2.5e-3, GB, GB, "bandwidth"),
        (2.5e-3, GB, 10**13, "compute"),
        (2.5e-3, 50_000_000, GB, "cache"),
        (2.5e-3, 50_000_001, GB, "bandwidth"),
        (2.5e-3, 50_000_000, 10**13, "compute"),
    ],
)
def test_a_pair_of_rows_tells_what_limits_both(launched: float, moved: int, flops: int, regime: str) -> None:
    env = machine()
    static, graph = limits(env, row(STATIC, env, launched, moved, flops), row(GRAPH, env, 2e-3, moved, flops))
    assert static.launch_share == pytest.approx(1 - 2e-3 / launched)
    assert graph.launch_share is None
    assert static.regime == regime
    assert graph.regime == ("bandwidth" if regime == "launch" else regime)
    assert (static.why, graph.why) == (None, None)


def test_the_profiler_checks_the_pair_and_stands_in_for_it() -> None:
    env = machine()
    static, graph = row(STATIC, env, 4e-3), row(GRAPH, env, 2e-3)
    traced = msgspec.structs.replace(static, bounds=msgspec.structs.replace(static.bounds, kernel_s=1.9e-3))
    both = limits(env, traced, graph)
    assert (both[0].launch_share, both[0].idle_share) == (pytest.approx(0.5), pytest.approx(0.525))
    assert both[1].idle_share is None
    (alone,) = limits(env, traced)
    assert (alone.launch_share, alone.idle_share, alone.regime) == (None, pytest.approx(0.525), "launch")
    busy = msgspec.structs.replace(traced, bounds=msgspec.structs.replace(static.bounds, kernel_s=3.6e-3))
    assert limits(env, busy)[0].regime == "bandwidth"


@given(st.floats(1e-6, 10), st.floats(1e-6, 10))
def test_the_launch_share_is_a_share(graph: float, launched: float) -> None:
    assert 0 <= regimes.launch_share(graph, launched) < 1


def test_shares_are_of_both_the_datasheet_and_the_ceilings() -> None:
    env = machine()
    (one,) = limits(env, row(GRAPH, env, 2e-3))
    h100 = devices.lookup("h100")
    assert one.measured.bandwidth == pytest.approx(GB / 2e-3 / 1e12)
    assert one.measured.compute == pytest.approx(GB / 2e-3 / 1e14)
    assert one.sheet.bandwidth == pytest.approx(GB / 2e-3 / h100.bandwidth)
    assert one.sheet.compute == pytest.approx(GB / 2e-3 / h100.rate("float16"))
    assert one.measured.roof == one.measured.bandwidth


def test_bytes_in_the_cache_are_judged_by_its_bandwidth() -> None:
    env = machine()
    (one,) = limits(env, row(GRAPH, env, 1e-4, moved=50_000_000))
    assert one.measured.bandwidth == pytest.approx(5e11 / 5e12)


def test_rows_of_other_environments_and_cells_explain_nothing() -> None:
    here, there = machine(), machine(device="NVIDIA H200")
    other = msgspec.structs.replace(GRAPH, batch=2)
    rows = (row(STATIC, here, 4e-3), row(GRAPH, there, 2e-3), row(other, here, 2e-3))
    found = regimes.joined(rows, {here.id: here, there.id: there})[0]
    assert found is not None
    assert (found.launch_share, found.regime) == (None, None)
    assert found.why == "the launch share is not known: run the same cell in cudagraph and static"


def test_without_a_pair_half_the_roof_is_enough() -> None:
    env = machine()
    assert limits(env, row(STATIC, env, 1.9e-3))[0].regime == "bandwidth"
    assert limits(env, row(STATIC, env, 2.1e-3))[0].regime is None
    eager = msgspec.structs.replace(STATIC, runtime="eager")
    assert "static tells" in str(limits(env, row(eager, env, 2.1e-3))[0].why)


def test_a_cpu_is_launch_bound_where_its_operations_alone_take_a_quarter() -> None:
    env = machine("cpu", "some CPU")
    (many,) = limits(env, row(STATIC, env, 4e-3, moved=1, ops={"mm": 150, "add": 51}))
    assert (many.regime, many.dispatch_share) == ("launch", pytest.approx(201 * 5e-6 / 4e-3))
    (few,) = limits(env, row(STATIC, env, 4e-3, moved=1, ops={"mm": 150, "add": 49}))
    assert few.regime is None
    assert str(few.why).startswith("no single cause takes half of the step; ")
    cuda = machine()
    (elsewhere,) = limits(cuda, row(STATIC, cuda, 4e-3, moved=1, ops={"mm": 201}))
    assert elsewhere.dispatch_share is None, "a GPU works while the host launches"


def test_without_peaks_there_is_no_regime_and_the_way_to_one() -> None:
    env = machine("cpu", "some CPU", None)
    (one,) = limits(env, row(STATIC, env, 1e-3))
    assert (one.regime, one.sheet.roof, one.measured.roof) == (None, None, None)
    assert "shortllama ceilings" in str(one.why)


def test_a_dtype_without_a_rate_is_said() -> None:
    env = machine("cpu", "some CPU", msgspec.structs.replace(PEAKS, flops={}))
    (one,) = limits(env, row(STATIC, env, 1e-3))
    assert (one.regime, one.measured.roof, one.measured.bandwidth) == (None, None, pytest.approx(1.0))
    assert "the rate for this dtype" in str(one.why)


def test_simulated_rows_are_judged_by_their_device() -> None:
    env = environment({"simulated": True, "figures": msgspec.to_builtins(devices.lookup("h100"))}, {})
    cell = msgspec.structs.replace(STATIC, runtime="roofline")
    (one,) = limits(env, msgspec.structs.replace(row(cell, env, 1e-3), simulated=True))
    assert (one.regime, one.launch_share) == ("bandwidth", None)
    assert one.sheet.bandwidth == pytest.approx(GB / 1e-3 / devices.lookup("h100").bandwidth)


def test_rows_without_times_have_no_limits_and_one_token_no_step() -> None:
    env = machine()
    oom = Measurement(STATIC, STATIC.id, env.id, "oom", False, SessionId("s"), bounds=Bounds(1, 1))
    one = msgspec.structs.replace(row(STATIC, env, 1.0), samples=Samples((0.1,), (0.1,), ()))
    single = msgspec.structs.replace(one, cell=msgspec.structs.replace(STATIC, output=1))
    found = regimes.joined((oom, single), {env.id: env})
    assert found[0] is None
    assert found[1] is not None
    assert (found[1].regime, found[1].why) == (None, "a single new token has no decode step")


def test_steps_not_timed_apart_are_what_follows_the_prefill() -> None:
    env = machine()
    whole = msgspec.structs.replace(row(STATIC, env, 1e-3), samples=Samples((0.1 + 16e-3,), (0.1,), ()))
    assert regimes.step_s(whole) == pytest.approx(1e-3)


def test_ceilings_that_cannot_be_read_are_named() -> None:
    env = environment({"kind": "cpu", "device": "x"}, {peaks.FACT: {"read": "fast"}})
    with pytest.raises(InputError, match="its ceilings cannot be read"):
        regimes.joined((row(STATIC, env, 1.0),), {env.id: env})


def test_predictions_are_made_for_the_datasheet_else_the_ceilings() -> None:
    known, cpu, bare = machine(), machine("cpu", "some CPU"), machine("cpu", "other CPU", None)
    found = regimes.devices_of([known, cpu, bare])
    assert found[known.id].bandwidth == devices.lookup("h100").bandwidth
    assert (found[cpu.id].bandwidth, found[cpu.id].nominal, found[cpu.id].cache_bandwidth) == (1e12, False, 5e12)
    assert found[bare.id].nominal
