"""A recommendation as a page: the choice marked in the figures, its reasons, every candidate, or what comes nearest."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path

import pytest
from test_recommendation import ALL, DENSE, DEPTH, RUN, WIDTH, candidate
from test_report_figures import boxes

from bench import recommendation
from bench.recommendation import Candidate, Constraint
from bench.report import advice, delimited, html, markdown, reasons
from bench.report.figures import canvas, draw
from bench.report.figures.pictures import render
from bench.report.values import Report, Source, Table
from shortllama import console

SOURCE = Source("e1", "X", "torch 2.13", "2026-11-22", run="mine", suite="quick", command="shortllama sweep quick")


def report(candidates: list[Candidate], constraints: list[Constraint]) -> Report:
    answer = recommendation.recommend(candidates, constraints)
    return advice.build(answer, constraints, candidates, [SOURCE])


def rows(of: Report, name: str) -> list[dict]:
    one: Table = next(table for table in of.tables if table.name == name)
    return [dict(zip([column.key for column in one.columns], row, strict=True)) for row in one.rows]


def test_the_choice_its_room_and_the_runner_up_are_said() -> None:
    made = report(ALL, [Constraint("perplexity", 10.0), Constraint("memory", 20)])
    assert made.title == "Take width in eager at batch 1"
    assert made.verdict.startswith("Asked for perplexity at most 10.0 and peak memory at most 20")
    kinds = [finding.kind for finding in made.findings]
    assert kinds == ["choice", "limit", "limit", "runner-up"]
    assert made.findings[1].headline == "Perplexity at most 10.0: 10% to spare, and this limit binds."
    assert "binds" not in made.findings[2].headline
    assert made.findings[3].headline.startswith("Runner-up: dense")
    assert {finding.figure for finding in made.findings} <= {chart.name for chart in made.charts}


def test_every_candidate_is_in_the_table_those_that_fit_first() -> None:
    made = report(ALL, [Constraint("perplexity", 10.0)])
    found = rows(made, "candidates")
    assert [(row["subject"], row["place"], row["meets"]) for row in found] == [
        ("width", "choice", "met"), ("dense", "runner-up", "met"), ("depth", None, "misses perplexity"),
    ]  # fmt: skip
    assert [row["front"] for row in found] == ["yes", "yes", "yes"]
    (limit,) = rows(made, "limits")
    assert (limit["value"], limit["binds"], limit["margin"]) == ("9.00", "yes", pytest.approx(0.1))
    table = next(one for one in made.tables if one.name == "candidates")
    assert float(next(csv.DictReader(delimited.table(table).splitlines()))["latency_s"]) == 2.5


def test_the_figures_mark_the_choice_and_draw_the_limits() -> None:
    made = report(ALL, [Constraint("memory", 12), Constraint("throughput", 20.0)])
    charts = {chart.name: chart for chart in made.charts}
    assert list(charts) == ["throughput-latency", "throughput-memory", "throughput-perplexity"]
    for chart in charts.values():
        (panel,) = chart.panels
        marked = {one.subject: word for one in panel.series for _, word in one.verdicts}
        assert marked == {"depth": "choice", "width": "runner-up"}
    lines = {guide.label: guide.points for guide in charts["throughput-memory"].panels[0].guides if guide.label}
    assert lines["peak memory at most 12\u00a0B"] == ((12, 128 / 3), (12, 64.0))
    assert lines["throughput at least 20.0"] == ((9, 20.0), (14, 20.0))
    steps = [guide.points for guide in charts["throughput-latency"].panels[0].guides if not guide.label]
    assert steps == [], "nothing but the fastest is on this front"
    (stairs,) = [g.points for g in charts["throughput-memory"].panels[0].guides if not g.label]
    assert stairs == ((9, 51.2), (10, 51.2), (10, 64.0))


def test_where_none_fits_the_closest_is_the_page() -> None:
    made = report(ALL, [Constraint("latency", 1.9), Constraint("perplexity", 9.0)])
    assert made.title == "None of 3 candidates meets every limit"
    assert made.verdict.startswith(
        "Asked for latency at most 1.90\u00a0s and perplexity at most 9.00. Closest is width"
    )
    assert [finding.kind for finding in made.findings] == ["nothing", "limit", "limit"]
    assert made.findings[2].headline == "Something would fit without the limit on latency."
    assert {w for c in made.charts for p in c.panels for s in p.series for _, w in s.verdicts} == {"closest"}
    assert rows(made, "limits")[0]["margin"] < 0


def test_what_is_not_known_is_said_and_one_value_is_no_figure() -> None:
    bare = [candidate("a", 1.0), candidate("b", 2.0)]
    made = report(bare, [Constraint("perplexity", 10.0)])
    assert [chart.name for chart in made.charts] == ["throughput-latency"], "equal memory, no perplexity"
    assert any(finding.headline.startswith("2 of 2 candidates have no perplexity") for finding in made.findings)
    assert rows(made, "limits")[0]["value"] is None


def test_many_subjects_leave_those_that_matter() -> None:
    every = [candidate(f"s{i:02}", 1.0 + i, 10 + i) for i in range(30)] + [candidate("best", 0.5, 5)]
    chart = report(every, []).charts[0]
    drawn = {one.subject for one in chart.panels[0].series}
    assert len(drawn) == 12
    assert {"best", "s00"} <= drawn, "the choice and the runner-up, wherever they stand"
    assert "subjects beyond 12 of 31" in chart.left_out


def test_origins_and_lengths_have_panels_of_their_own() -> None:
    import msgspec

    far = msgspec.structs.replace(DEPTH, origin="predicted for Y")
    longer = msgspec.structs.replace(WIDTH, cell=msgspec.structs.replace(WIDTH.cell, output=512))
    made = report([DENSE, WIDTH, far, msgspec.structs.replace(far, memory_bytes=8), longer], [])
    titles = [panel.title for panel in made.charts[0].panels]
    assert titles == [
        "measured on X · prompt 12 · output 128", "predicted for Y · prompt 12 · output 128",
        "measured on X · prompt 12 · output 512",
    ]  # fmt: skip
    assert [all(s.simulated for s in panel.series) for panel in made.charts[0].panels] == [False, True, False]
    assert advice.PREDICTED in made.notes
    assert made.charts[0].simulated


def test_a_hostile_subject_stays_text() -> None:
    made = report([candidate("<script>alert(1)</script>", 1.0, 9), candidate("b|`*", 2.0, 8)], [])
    page = html.render(made, {chart.name: render(chart) for chart in made.charts})
    assert "<script>alert" not in page
    assert "\\<script\\>" in markdown.render(made)


@pytest.mark.parametrize("size", [draw.WIDE, draw.NARROW, draw.FILE])
def test_no_two_texts_of_a_figure_meet(size) -> None:
    made = report(ALL, [Constraint("memory", 12), Constraint("latency", 2.2)])
    for chart in made.charts:
        with canvas.drawing("test"):
            found = boxes(draw.draw(chart, size))
        for place, (text, box) in enumerate(found):
            for other, another in found[place + 1 :]:
                assert not box.overlaps(another), f"{text!r} meets {other!r}"


# -- the command -------------------------------------------------------------------------------------------------------


def test_the_command_writes_a_folder_like_a_report(run_command: Callable, tmp_path: Path) -> None:
    out = tmp_path / "advice"
    done = run_command("recommend", RUN, "--max-ppl", 10, "--out", out)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("take reference/wanda-sp:0.25 ")
    page = (out / "index.html").read_text(encoding="utf-8")
    assert "Take reference/wanda-sp:0.25 in " in page
    assert "shortllama sweep quick --out again" in page, "where its numbers come from, and how to get them again"
    names = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    assert {"report.md", "tables/candidates.csv", "tables/limits.csv", "figures/throughput-latency.svg"} <= names


def test_none_fits_is_a_page_and_exit_code_1(run_command: Callable, tmp_path: Path) -> None:
    done = run_command("recommend", RUN, "--max-latency", "1ms", "--out", tmp_path / "none", "--json")
    assert done.returncode == 1
    assert "None of 28 candidates" in (tmp_path / "none" / "index.html").read_text(encoding="utf-8")


def test_a_folder_that_is_not_ours_is_refused_before_anything(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    from bench.cli import app

    (tmp_path / "mine.txt").write_text("x")
    assert console.run(app, ["recommend", str(RUN), "--out", str(tmp_path)]) == 2
    seen = capsys.readouterr()
    assert (seen.out, seen.err.count("\n")) == ("", 1)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_sentences_of_the_terminal_and_the_page_are_the_same() -> None:
    constraints = [Constraint("perplexity", 10.0)]
    said = "\n".join(reasons.lines(recommendation.recommend(ALL, constraints), constraints)).lower()
    for finding in report(ALL, constraints).findings[1:2]:
        assert finding.headline.removesuffix(".").lower() in said
