"""What a sweep will run: every cell once, subjects together, memory overruns implied, resuming by difference."""

from __future__ import annotations

import subprocess
import sys
from itertools import groupby

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench import cells, devices, filters, memory, prediction, schedule, timing
from bench.cells import Cell, Suite
from bench.devices import Device
from bench.measurement import Measurement, SessionId
from bench.schedule import Schedule, Witnesses
from bench.subjects import Subject
from shortllama import catalogue
from shortllama.errors import InputError
from shortllama.shape import ModelShape

SMALL = ModelShape.uniform(vocabulary=64, hidden=32, head_dim=8, blocks=4, query_heads=4, kv_heads=2, neurons=64)
SUBJECTS = {
    name: Subject(name, msgspec.structs.replace(SMALL, blocks=SMALL.blocks[:count]), "a")
    for name, count in (("a", 4), ("b", 3), ("c", 1))
}
DEVICE = Device("test", "test", 1 << 20, 1e9, {"float32": 1e9, "float16": 1e9})


def suite(**fields: object) -> Suite:
    return msgspec.convert({"schema": cells.SUITE_SCHEMA, "subjects": list(SUBJECTS), **fields}, Suite)


def plan(grid: Suite, device: Device = DEVICE, **more) -> Schedule:
    return schedule.plan(grid, device, subjects=SUBJECTS, **more)


def axis(*values: object) -> st.SearchStrategy[list[object]]:
    return st.lists(st.sampled_from(values), min_size=1, unique=True)


SUITES = st.builds(
    suite,
    runtimes=axis("eager", "static"),
    dtypes=axis("float16", "float32"),
    prompt=axis(2, 8),
    output=axis(4, 16, 64),
    budgets=axis("none", "64KiB", "512KiB"),
    batch=axis(1, 2, 8, 64, 4096) | st.just({}) | st.just({"from": 3, "factor": 4}),
    seed=st.integers(0, 5),
)


@settings(deadline=None)
@given(SUITES)
def test_every_cell_is_there_once_and_either_runs_or_is_implied(grid: Suite) -> None:
    planned = list(plan(grid).planned())
    assert len({one.cell_id for one in planned}) == len(planned)
    assert all(one.cell_id == one.cell.id for one in planned)
    wanted = list(cells.expand(grid))
    if isinstance(grid.batch, tuple):
        assert sorted(one.cell for one in planned) == sorted(wanted)
    else:
        assert {one.cell for one in planned} <= set(wanted)
    witnesses = Witnesses()
    for one in planned:
        implied = witnesses.of(one.cell) is not None
        over = one.memory_bytes > limit(one.cell)
        assert one.expected == ("oom-implied" if over and implied else "oom" if over else "ok")
        assert not (implied and not over)  # memory never falls along an axis, so what is implied is over
        if one.expected == "oom":
            witnesses.add(one.cell)


def limit(cell: Cell) -> int:
    return min(cells.budget_bytes(cell.budget) or DEVICE.memory_bytes, DEVICE.memory_bytes)


@settings(deadline=None)
@given(SUITES)
def test_groups_share_everything_but_the_batch_which_ascends(grid: Suite) -> None:
    groups = plan(grid).groups
    assert len({group.key for group in groups}) == len(groups)
    for group in groups:
        batches = [one.cell.batch for one in group.cells]
        assert batches == sorted(set(batches))
        assert {one.cell.group for one in group.cells} == {group.key}
        assert group.subject == SUBJECTS[group.key.subject]
        assert group.limit_bytes == limit(group.key)


@settings(deadline=None)
@given(SUITES)
def test_groups_that_differ_only_in_subject_run_back_to_back(grid: Suite) -> None:
    keys = [msgspec.structs.replace(group.key, subject="") for group in plan(grid).groups]
    sets = [(key, len(list(members))) for key, members in groupby(keys)]
    assert len({key for key, _ in sets}) == len(sets)
    assert all(count == len(SUBJECTS) for _, count in sets)


@settings(deadline=None)
@given(SUITES)
def test_a_witness_comes_before_what_it_implies(grid: Suite) -> None:
    """Prompt and output ascend between groups of one family, so a smaller cell never follows a larger one."""
    seen: dict[tuple[str, ...], tuple[int, int]] = {}
    for group in plan(grid).groups:
        key = group.key
        family = (key.subject, key.runtime, key.dtype, key.attention, key.budget)
        assert seen.get(family, (0, 0)) < (key.prompt, key.output)
        seen[family] = (key.prompt, key.output)


@settings(deadline=None)
@given(SUITES)
def test_an_open_range_goes_a_safe_step_beyond_what_is_predicted_to_fit(grid: Suite) -> None:
    grid = msgspec.structs.replace(grid, batch=cells.BatchRange())
    for group in plan(grid).groups:
        sizes = [one.memory_bytes for one in group.cells]
        assert sizes[-1] > schedule.BEYOND * group.limit_bytes
        assert all(size <= schedule.BEYOND * group.limit_bytes for size in sizes[:-1])
        key, shape = group.key, group.subject.shape
        sized = (shape, key.runtime, key.dtype, key.prompt, key.output, group.limit_bytes)
        assert group.cells[-1].cell.batch > memory.largest_batch(*sized)


def test_the_order_of_subjects_is_seeded_and_differs_between_sets() -> None:
    grid = suite(output=list(range(4, 24)))
    orders = [group.key.subject for group in plan(grid).groups]
    assert orders == [group.key.subject for group in plan(grid).groups]
    assert orders != [group.key.subject for group in plan(msgspec.structs.replace(grid, seed=1)).groups]
    sets = [tuple(orders[i : i + 3]) for i in range(0, len(orders), 3)]
    assert len(set(sets)) > 1


# -- resume -----------------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(SUITES, st.data())
def test_what_remains_is_the_difference_in_the_same_order(grid: Suite, data: st.DataObject) -> None:
    whole = plan(grid)
    ids = [one.cell_id for one in whole.planned()]
    done = data.draw(st.sets(st.sampled_from(ids)))
    rest = schedule.remaining(whole, done)
    assert [one.cell_id for one in rest.planned()] == [one for one in ids if one not in done]
    assert all(group.cells for group in rest.groups)
    assert schedule.remaining(whole, ids).groups == ()
    assert schedule.remaining(whole, ()) == whole


# -- witnesses --------------------------------------------------------------------------------------------------------


CELLS = st.builds(
    Cell,
    st.sampled_from(["a", "b"]),
    st.sampled_from(["eager", "static"]),
    st.just("float16"),
    st.just("sdpa"),
    st.integers(1, 3),
    st.integers(1, 3),
    st.sampled_from(["none", "1GiB"]),
    st.integers(1, 3),
)


@given(st.lists(CELLS, max_size=6), CELLS)
def test_implied_means_dominated_by_a_smaller_cell_of_the_same_family(met: list[Cell], cell: Cell) -> None:
    rows = [Measurement(one, one.id, "e", "oom", False, SessionId("s")) for one in met]
    found = Witnesses(rows).of(cell)
    same = ("subject", "runtime", "dtype", "attention", "budget")
    sizes = ("batch", "prompt", "output")
    dominating = [
        one
        for one in met
        if all(getattr(one, name) == getattr(cell, name) for name in same)
        and all(getattr(one, name) <= getattr(cell, name) for name in sizes)
    ]
    assert (found in dominating) if dominating else found is None


def test_only_real_out_of_memory_is_a_witness() -> None:
    cell = Cell("a", "eager", "float16", "sdpa", 1, 1, "none", 1)
    for outcome in ("ok", "oom-implied", "failed", "timed-out", "skipped"):
        row = Measurement(cell, cell.id, "e", outcome, False, SessionId("s"))
        assert Witnesses([row]).of(cell) is None


# -- predictions, filters, errors -------------------------------------------------------------------------------------


def test_a_filter_chooses_cells_and_one_that_leaves_nothing_is_refused() -> None:
    grid = suite(batch=[1, 2, 4])
    chosen = list(plan(grid, keep=filters.parse("batch<=2 and subject==a")).planned())
    assert [(one.cell.subject, one.cell.batch) for one in chosen] == [("a", 1), ("a", 2)]
    with pytest.raises(InputError, match="leaves no cell"):
        plan(grid, keep=lambda cell: False)


def test_predictions_are_those_of_the_models() -> None:
    grid = Suite(cells.SUITE_SCHEMA, ("llama-7b",), batch=(1, 64), output=(512,), cell_seconds=20)
    device = devices.lookup("h100")
    first, second = schedule.plan(grid, device).planned()
    shape = catalogue.lookup("llama-7b")
    assert second.memory_bytes == memory.predict(shape, "eager", "float16", 64, 12, 512)
    assert first.call_s == prediction.call_s(shape, first.cell, device)
    assert first.cell_s == prediction.cell_s(first.call_s, timing.careful(20))
    assert schedule.plan(grid, device).seconds == (first.cell_s or 0) + (second.cell_s or 0)


def test_the_papers_launch_bound_latencies_are_predicted() -> None:
    """Table 2, H100, batch 1: 2.4, 1.9, 1.7 and 1.6 s for 32, 26, 23 and 21 blocks."""
    device = devices.lookup("h100")
    for blocks, seconds in ((32, 2.4), (26, 1.9), (23, 1.7), (21, 1.6)):
        cell = Cell(f"llama-7b/depth:{blocks}", "paper", "float16", "sdpa", 12, 128, "none", 1)
        assert prediction.call_s(catalogue.lookup(cell.subject), cell, device) == pytest.approx(seconds, rel=0.05)
        assert prediction.launch_share(catalogue.lookup(cell.subject), cell, device) > 0.5


def test_a_rate_that_is_not_known_leaves_times_out_and_memory_in() -> None:
    for device in (devices.lookup("rtx3090"), devices.unknown("T4", 16 << 30)):
        one = next(plan(suite(dtypes=["float64"]), device).planned())
        assert (one.call_s, one.cell_s) == (None, None)
        assert one.memory_bytes > 0


@given(st.floats(1e-5, 100), st.floats(0.5, 60))
def test_the_predicted_time_of_a_cell_is_at_least_what_its_rule_takes(call_s: float, budget: float) -> None:
    """Against the loop itself on a device without noise, which ends by its interval as soon as it may."""
    from bench.runtimes.protocol import Call

    now = [0.0]

    def call() -> Call:
        now[0] += call_s
        return Call(call_s, call_s, (), 1)

    rule = timing.careful(budget)
    if call_s > 0.01:  # the loop over tens of thousands of calls is slow, and its rule is the same
        timing.measure(call, lambda: now[0], rule)
        assert now[0] <= prediction.cell_s(call_s, rule) + 3 * call_s
        assert prediction.cell_s(call_s, rule) <= now[0] + budget + 3 * call_s
    assert prediction.cell_s(call_s, timing.paper()) == pytest.approx(30 * call_s)


def test_planning_ten_thousand_cells_imports_nothing_heavy() -> None:
    code = """
import sys
from bench import devices, schedule
from bench.cells import SUITE_SCHEMA, Suite
suite = Suite(SUITE_SCHEMA, ("llama-7b", "llama-7b/depth:21..29"), ("eager",), batch=tuple(range(1, 1001)))
found = schedule.plan(suite, devices.lookup("h100"))
assert len(list(found.planned())) == 10_000
heavy = {"torch", "transformers", "numpy", "scipy", "matplotlib"} & set(sys.modules)
assert not heavy, heavy
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
