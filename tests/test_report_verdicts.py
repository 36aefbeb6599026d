"""Two runs in one report: which are judged, that they keep apart, and the gate's verdicts on figures and in tables."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
import report_cases as cases
from test_report_figures import boxes

from bench import comparison, experiment
from bench.cells import Cell
from bench.experiment import Design
from bench.measurement import SessionId
from bench.report import build, delimited, html, verdicts
from bench.report.figures import canvas, draw
from bench.report.figures.pictures import render
from bench.report.sources import Origin
from bench.report.values import Chart, Report, Table
from bench.store import Results

BATCHES = (1, 8, 64)


def run(
    slower: dict[int, float], *, name: str = "base", date: str = "2026-11-22", pairs: int = 5, subject: str = "m",
    design: Design | None = None, device: str = "AMD EPYC 9254",
) -> Results:  # fmt: skip
    """Sessions of one subject in two runtimes; `slower`: factors on the latency by batch; 0.1 % of noise."""
    env = cases.machine(device, date)
    env = experiment.signed(env, design) if design else env
    rows = []
    for pair in range(1, pairs + 1):
        for runtime in ("eager", "static"):
            for batch in BATCHES:
                cell = Cell(subject, runtime, "float32", "sdpa", 12, 32, "none", batch)
                middle = 0.1 * math.sqrt(batch) * slower.get(batch, 1.0) * (1 + 0.001 * math.sin(7 * pair * batch))
                calls = tuple(float(f"{middle * (1 + i / 1e4):.6g}") for i in range(20))
                session = SessionId(f"{name}{pair}", pair, experiment.order_name(pair))
                rows.append(cases.row(cell, env, "ok", calls, session=session, tokens=32 * batch))
    return Results(Path(name) / "measurements.jsonl", {env.id: env}, tuple(rows), ())


def few(batches: set[int], name: str) -> Results:
    """One session of a grid of its own."""
    of = run({}, name=name, pairs=1)
    row = of.measurements[0]
    cells = [msgspec.structs.replace(row.cell, batch=batch) for batch in sorted(batches)]
    rows = tuple(msgspec.structs.replace(row, cell=cell, cell_id=cell.id, tokens=32 * cell.batch) for cell in cells)
    return Results(of.path, of.environments, rows, ())


def design(**more: object) -> Design:
    return Design("x", "main", "branch", **more)  # pyright: ignore[reportArgumentType]


def sides(**more: object) -> list[Results]:
    """An experiment in which batch 8 became slower by a tenth and batch 64 faster."""
    one = design(**more)
    return [run({}, name="base", design=one), run({8: 1.1, 64: 0.9}, name="head", design=one)]


def report(results: list[Results]) -> Report:
    return build(results, None, [Origin(one.path.parent.name) for one in results])


def chart(of: Report, name: str) -> Chart:
    return next(one for one in of.charts if one.name == name)


def table(of: Report, name: str) -> Table:
    return next(one for one in of.tables if one.name == name)


def marks(of: Chart) -> dict[str, dict[int, str]]:
    """Verdicts by panel and batch."""
    return {
        panel.title: {one.points[place].batch: verdict for one in panel.series for place, verdict in one.verdicts}
        for panel in of.panels
    }  # fmt: skip


def test_sides_stand_beside_each_other_with_the_verdicts_of_compare() -> None:
    results = sides()
    made = report(results)
    expected = {1: "equivalent", 8: "regressed", 64: "improved"}
    for name in ("latency-throughput", "latency-batch", "throughput-batch"):
        assert marks(chart(made, name)) == {
            "eager · base": {}, "eager · head": expected, "static · base": {}, "static · head": expected,
        }  # fmt: skip
    told = {c.cell_id: c.decision.verdict for c in comparison.compare(*results).changes if c.metric == "latency"}
    assert sorted(told.values()) == sorted(2 * list(expected.values())), "and so says the gate itself"
    drawn = {panel.title: [p.y for p in panel.series[0].points] for panel in chart(made, "latency-batch").panels}
    assert drawn["eager · head"][1] == pytest.approx(1.1 * drawn["eager · base"][1], rel=0.01)
    assert "m at batch 8 regressed" in chart(made, "latency-batch").alternative
    assert "gate's verdicts" in chart(made, "latency-batch").reading


def test_the_order_given_does_not_turn_an_experiment_round() -> None:
    base, head = sides()
    (one,) = verdicts.judged([head, base])
    assert (one.base, one.head, one.names) == (1, 0, ("base", "head"))


def test_the_table_holds_every_change_worst_first() -> None:
    results = sides()
    one = table(report(results), "verdicts")
    keys = [column.key for column in one.columns]
    found = [dict(zip(keys, row, strict=True)) for row in one.rows]
    assert len(found) == len(comparison.compare(*results).changes)
    assert [row["verdict"] for row in found] == sorted((r["verdict"] for r in found), key=verdicts.ORDER.index)
    (row,) = [r for r in found if r["metric"] == "latency" and r["cell"].startswith("m eager") and " M8 " in r["cell"]]
    assert (row["verdict"], row["pairs"]) == ("regressed", 5)
    assert row["ratio"] == pytest.approx(1.1, rel=0.01)
    assert row["ratio_interval"][0] < row["ratio"] < row["ratio_interval"][1]
    assert one.constant == "base: base · head: head", "no notes of an experiment"
    rows = list(csv.DictReader(delimited.table(one).splitlines()))
    assert float(rows[0]["head_value"]) / float(rows[0]["base_value"]) == pytest.approx(
        float(rows[0]["ratio"]), rel=0.01
    )
    pooled = table(report(results), "verdicts-pooled")
    assert [row[0] for row in pooled.rows] == ["m"] * len(pooled.rows)


def test_the_finding_counts_and_names_the_command() -> None:
    made = report(sides())
    first = made.findings[0]
    assert first.kind == "verdict"
    assert "2 regressed" in first.headline or "4 regressed" in first.headline
    assert first.cause.startswith("Worst: ")
    assert first.command == "shortllama compare base head"
    assert first.figure == "latency-batch"


def test_two_dates_on_one_fingerprint_are_judged_and_told_by_their_dates() -> None:
    later, earlier = run({}, name="b", date="2026-11-24"), run({8: 1.1}, name="a", date="2026-11-20")
    (one,) = verdicts.judged([later, earlier])
    assert (one.base, one.head, one.names) == (1, 0, ("2026-11-20", "2026-11-24"))
    made = report([later, earlier])
    assert {panel.title for panel in chart(made, "latency-batch").panels} == {
        f"{runtime} · {date}" for runtime in ("eager", "static") for date in ("2026-11-20", "2026-11-24")
    }  # fmt: skip
    assert {source.run for source in made.sources} == {"a", "b"}, "both have their provenance"
    assert made.findings[0].command == "shortllama compare a b"


def test_two_runs_of_one_day_are_told_by_their_names() -> None:
    (one,) = verdicts.judged([run({}, name="a"), run({}, name="b")])
    assert one.names == ("a", "b")
    (one,) = verdicts.judged([run({}, name="a"), run({}, name="a")])
    assert one.names == ("first", "second")


def test_one_session_a_side_is_inconclusive_on_the_figures_too() -> None:
    results = [run({}, name="a", pairs=1), run({8: 1.02}, name="b", pairs=1)]
    made = marks(chart(report(results), "latency-batch"))
    assert set(made["eager · b"].values()) == {"inconclusive"}


@pytest.mark.parametrize(
    "results",
    [
        [run({})],
        [run({}, name=name) for name in "abc"],  # a history: see the trend
        [run({}, name="a"), run({}, name="b", device="NVIDIA L4")],  # two devices
        [run({}, name="a"), run({}, name="b", subject="other")],  # no cell in common
        [run({}, name="a"), few({8, 16, 32}, "b")],  # another grid, one batch in common
        list(cases.two_devices()),
    ],
)
def test_other_runs_are_not_judged(results: list[Results]) -> None:
    assert verdicts.judged(results) == ()
    made = build(results)
    assert not any(series.verdicts for one in made.charts for panel in one.panels for series in panel.series)
    assert "verdicts" not in [one.name for one in made.tables]
    assert not any(source.side for source in made.sources)


def test_sides_that_are_subjects_share_their_panels() -> None:
    one = design(by_subject=True)
    results = [run({}, name="base", subject="m", design=one), run({8: 1.1}, name="head", subject="other", design=one)]
    panels = chart(report(results), "latency-batch").panels
    assert [panel.title for panel in panels] == ["eager", "static"]
    assert {s.subject: dict(s.verdicts) for s in panels[0].series} == {
        "m": {}, "other": {0: "equivalent", 1: "regressed", 2: "equivalent"},
    }  # fmt: skip


def test_two_devices_twice_are_two_pairs() -> None:
    machines = ("AMD EPYC 9254", "NVIDIA L4")
    results = [
        run({}, name=f"{i}{d}", device=device, date=f"2026-11-2{d}")
        for i, device in enumerate(machines)
        for d in (0, 1)
    ]
    assert [(one.base, one.head) for one in verdicts.judged(results)] == [(0, 1), (2, 3)]
    titles = {panel.title for panel in chart(report(results), "latency-batch").panels}
    assert "eager · NVIDIA L4 · 2026-11-21" in titles
    assert "between" not in table(report(results), "verdicts").hidden


@pytest.mark.parametrize("size", [draw.WIDE, draw.NARROW, draw.FILE])
def test_marks_have_a_key_and_no_two_texts_meet(size) -> None:
    one = chart(report(sides()), "latency-batch")
    with canvas.drawing("test"):
        sheet = draw.draw(one, size)
        texts = [text.get_text() for text in sheet.figure.findobj(match=lambda a: hasattr(a, "get_text"))]
        assert {"regressed", "improved", "equivalent"} <= set(texts)
        found = boxes(sheet)
    for place, (text, box) in enumerate(found):
        for other, another in found[place + 1 :]:
            assert not box.overlaps(another), f"{text!r} meets {other!r}"


def test_marks_are_in_the_csv_of_judged_figures_only() -> None:
    rows = list(csv.DictReader(delimited.chart(chart(report(sides()), "latency-batch")).splitlines()))
    assert [row["verdict"] for row in rows if row["panel"] == "eager · head"] == ["equivalent", "regressed", "improved"]
    results, quality = cases.quick()
    assert "verdict" not in delimited.chart(chart(build([results], quality), "latency-batch")).splitlines()[0]


def test_the_page_has_the_verdicts() -> None:
    made = report(sides())
    text = html.render(made, {one.name: render(one) for one in made.charts})
    assert '<h2 id="verdicts">' in text
    assert text.count(">regressed<") >= 4


def test_a_report_of_an_experiment_on_disk(run_command: Callable, tmp_path: Path) -> None:
    from test_report import save

    paths = [save(one, tmp_path / one.path.parent.name) for one in sides()]
    done = run_command("report", *paths, "--out", tmp_path / "report", "--json")
    assert done.returncode == 0, done.stderr
    assert "tables/verdicts.csv" in json.loads(done.stdout)["files"]
    assert msgspec.structs.asdict(verdicts.judged(sides())[0])["names"] == ("base", "head")
