"""The history of cells in a report: twelve runs with two planted steps, and what is said of them."""

from __future__ import annotations

import random

import msgspec
import pytest
import report_cases as cases

from bench import noise
from bench.report import trend
from bench.report.sources import Origin, describe
from bench.report.summaries import Grid, grid
from bench.store import Results

SLOWER, FASTER = ("reference", "static", 8, 7, 1.12), ("reference/ppl:0.25", "eager", 1, 4, 0.9)


def runs(count: int = 12, steps=(SLOWER, FASTER), sigma: float = 0.008, **facts: object) -> list[Results]:
    """Runs of one suite, a day apart; each step is (subject, runtime, batch, first run, factor)."""
    base = cases.quick()[0]
    made: list[Results] = []
    for run in range(count):
        drawn = random.Random(run)
        date = {"date": f"2026-11-{run + 1:02d}T10:00:00+00:00", "commit": f"{run:04x}abc12345"}
        where = msgspec.structs.replace(cases.machine(), facts=date | facts)
        rows = []
        for row in base.measurements:
            factor = drawn.lognormvariate(0, sigma)
            for subject, runtime, batch, first, step in steps:
                if (row.cell.subject, row.cell.runtime, row.cell.batch) == (subject, runtime, batch) and run >= first:
                    factor *= step
            calls = tuple(float(f"{value * factor:.6g}") for value in row.samples.call_s)
            rows.append(msgspec.structs.replace(row, samples=msgspec.structs.replace(row.samples, call_s=calls)))
        made.append(Results(base.path, {where.id: where}, tuple(rows), ()))
    return made


def gridded(results: list[Results]) -> Grid:
    sources = {one.id: describe(one, Origin("r")) for run in results for one in run.environments.values()}
    return grid([row for run in results for row in run.measurements], [], sources, {})


def changed(results: list[Results]) -> dict[tuple[str, str, int], list[tuple[int, float]]]:
    return {
        (one.cell.subject, one.cell.runtime, one.cell.batch): [(c.at, round(c.ratio, 2)) for c in one.changes]
        for one in trend.histories(results) if one.changes
    }  # fmt: skip


def test_planted_steps_are_found_and_nothing_else():
    found = changed(runs())
    assert found.keys() == {SLOWER[:3], FASTER[:3]}
    ((at, ratio),) = found[SLOWER[:3]]
    assert (at, ratio) == (SLOWER[3], pytest.approx(SLOWER[4], abs=0.02))
    assert changed(runs(steps=())) == {}


def test_runs_are_put_in_order_by_their_dates():
    shuffled = runs()
    random.Random(1).shuffle(shuffled)
    assert changed(shuffled) == changed(runs())


def test_the_machines_own_noise_decides():
    """A step of 12 % is none on a machine whose sessions of equal code differ by 40 %."""
    assert changed(runs(**{noise.BETWEEN_FACT: 0.4})) == {}


def test_few_runs_are_no_history():
    results = runs(3)
    assert trend.histories(results) == ()
    assert trend.charts((), gridded(results)) == ()
    assert trend.tables((), gridded(results)) == ()
    assert trend.findings((), gridded(results)) == ()


def test_another_environment_begins_a_new_history():
    before, after = runs(4, steps=()), runs(4, steps=())
    other = cases.machine("another")
    for place, run in enumerate(after):
        rows = tuple(msgspec.structs.replace(row, environment=other.id) for row in run.measurements)
        after[place] = msgspec.structs.replace(run, environments={other.id: other}, measurements=rows)
    found = trend.histories([*before, *after])
    assert {len(one.seen) for one in found} == {4}
    assert {one.setting.environment for one in found} == {cases.machine().id, other.id}


def test_the_figure_marks_what_the_table_and_the_findings_name():
    results = runs()
    found, measured = trend.histories(results), gridded(results)
    (chart,) = trend.charts(found, measured)
    marked = [(s.subject, s.runtime, s.changes) for panel in chart.panels for s in panel.series if s.changes]
    assert sorted(marked) == sorted([(SLOWER[0], SLOWER[1], (7,)), (FASTER[0], FASTER[1], (4,))])
    assert chart.panels[0].series[0].points[0].y == 1.0
    (table,) = trend.tables(found, measured)
    rows = [dict(zip([column.key for column in table.columns], row, strict=True)) for row in table.rows]
    assert len(rows) == len(found) + 2
    (step,) = [row for row in rows if row["change"] and row["runtime"] == "static"]
    assert (step["from_run"], step["from_date"], step["runs"]) == (8, "2026-11-08", 5)
    first, second = trend.findings(found, measured)
    assert "became slower: 1.1" in first.headline
    assert first.command == "shortllama ab --base 0006abc12345 --head 0007abc12345"
    assert "became faster: 0.9" in second.headline
