"""The report in a terminal: nothing wider than it, nothing that acts, and a folder or the screen, or both."""

from __future__ import annotations

import io
from itertools import pairwise

import hardware_cases
import msgspec
import pytest
import report_cases as cases
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.console import Console
from test_report import save

from bench.cli import app
from bench.report import build, terminal
from shortllama import console


def text(report, width: int, **settings) -> str:
    out = io.StringIO()
    Console(file=out, width=width, highlight=False, **settings).print(terminal.render(report, width))
    return out.getvalue()


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=30))
def test_a_sparkline_keeps_the_order_of_values(values):
    line = terminal.sparkline(values)
    assert len(line) == len(values)
    places = [terminal.STEPS.index(mark) for mark in line]
    ranked = sorted(range(len(values)), key=lambda i: values[i])
    assert all(places[a] <= places[b] for a, b in pairwise(ranked))


def test_a_sparkline_of_equal_values_is_flat_in_the_middle():
    assert terminal.sparkline([3.0, 3.0]) == "▄▄"
    assert terminal.sparkline([1.0, 2.0]) == "▁█"


@pytest.mark.parametrize("width", [60, 80, 120])
def test_no_line_is_wider_than_the_terminal(width):
    results, quality = cases.quick()
    report = build([results], quality)
    shown = text(report, width)
    assert max(cell_len(line) for line in shown.splitlines()) <= width
    for chart in report.charts:
        assert chart.title in shown
    if width == 80:
        assert "wanda-sp:0.25" in shown.partition("Every cell")[2]


def test_figures_of_every_form_have_their_numbers():
    results, quality = cases.quick()
    report = msgspec.structs.replace(build([results], quality), charts=tuple(hardware_cases.charts().values()))
    shown = text(report, 100).replace("\u00a0", " ")
    assert "700 µs + 500 µs a block, R² 1.000" in shown
    assert "launch-bound (eager)" in shown
    assert "KV cache" in shown


def test_hostile_names_stay_text():
    results, quality = cases.hostile()
    shown = text(build([results], quality), 80, force_terminal=True, color_system="standard")
    assert "\x07" not in shown
    assert "\u202e" not in shown
    assert text(build([cases.only_oom()]), 80)
    assert text(build([cases.one_cell()]), 80)


def test_the_command_shows_writes_or_refuses(tmp_path, capsys):
    run = save(cases.quick()[0], tmp_path / "run")
    assert console.run(app, ["report", str(run), "--terminal"]) == 0
    assert "Every cell" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    assert console.run(app, ["report", str(run)]) == 2
    assert "--terminal" in capsys.readouterr().err
    assert console.run(app, ["report", str(run), "--terminal", "--json"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
