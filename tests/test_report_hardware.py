"""The figures about the machine as data, and that their drawings hold together."""

from __future__ import annotations

import itertools

import hardware_cases as hardware_rows
import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from report_cases import MIB
from test_report_figures import boxes

from bench.report import delimited, hardware, summaries
from bench.report.figures import canvas, draw, forms
from bench.report.figures.placement import Box
from bench.report.values import Axis, Chart

NAMES = (
    "speedup-parameters", "launch-fit", "roofline", "memory-parts", "oom-map", "step-positions", "utilisation-batch",
    "energy-batch", "layer-widths",
)  # fmt: skip


@pytest.fixture(scope="module")
def charts() -> dict[str, Chart]:
    return hardware_rows.charts()


@given(st.floats(0, 1), st.floats(1e-6, 1), st.lists(st.integers(1, 80), min_size=3, unique=True))
def test_the_fit_finds_the_line_it_was_given(start, slope, blocks):
    found = hardware.fit(blocks, [start + slope * count for count in blocks])
    assert found.block_s == pytest.approx(slope, rel=1e-6)
    assert found.step_s == pytest.approx(start, abs=1e-6)
    assert found.r2 == pytest.approx(1)


def test_the_fit_tells_cost_of_a_block_from_the_rest(charts):
    chart = charts["launch-fit"]
    assert [guide.label.replace("\u00a0", " ") for panel in chart.panels for guide in panel.guides] == [
        "700 µs + 500 µs a block, R² 1.000", "350 µs + 250 µs a block, R² 1.000",
    ]  # fmt: skip
    drawn = {one.subject: one.points[0] for one in chart.panels[0].series}
    assert {subject: point.x for subject, point in drawn.items()} == {"m": 12, "m/depth-9": 9, "m/depth-6": 6}
    assert drawn["m/depth-6"].y == pytest.approx(hardware_rows.STEP_S + 6 * hardware_rows.BLOCK_S, rel=0.01)


def test_two_depths_are_no_fit():
    grid = hardware_rows.grid()
    fewer = {name: shape for name, shape in grid.shapes.items() if name != "m/depth-9"}
    assert "launch-fit" not in hardware_rows.charts(msgspec.structs.replace(grid, shapes=fewer))


def test_speedups_stand_over_the_parameters_removed(charts):
    (series,) = [one for one in charts["speedup-parameters"].panels[0].series if one.subject == "m/depth-6"]
    shapes = hardware_rows.SHAPES
    (point,) = series.points
    assert point.x == pytest.approx(1 - shapes["m/depth-6"].parameters / shapes["m"].parameters)
    assert point.y == pytest.approx((0.7 + 12 * 0.5) / (0.7 + 6 * 0.5), rel=1e-3)


def test_parts_add_up_to_the_measured_peak(charts):
    (bar,) = [one for one in charts["memory-parts"].panels[0].bars if one.subject == "m"]
    parts = {part.label: part.value for part in bar.parts}
    shape = hardware_rows.DENSE
    assert parts["weights"] == shape.weight_bytes("float32")
    assert parts["KV cache"] == 64 * 44 * shape.kv_bytes_per_token("float32")
    assert parts["workspace"] == MIB + 64 * 1024


def test_a_roof_is_drawn_where_the_shares_say_it_is(charts):
    (panel,) = charts["roofline"].panels
    (roof,) = panel.guides
    assert roof.label == "measured ceilings"
    assert any(x == pytest.approx(10) and y == pytest.approx(1e11) for x, y in roof.points)
    assert sum(len(one.points) for one in panel.series) == len(hardware_rows.rows())
    assert {(one.label, point.batch) for one in panel.series for point in one.points} == {
        ("launch-bound", 1), ("no single cause", 8), ("no single cause", 64),
    }  # fmt: skip


def test_only_searched_ends_are_mapped(charts):
    panel = charts["oom-map"].panels[0]
    assert [(point.x, point.y) for point in panel.series[0].points] == [(44, 90), (140, 28), (524, 7)]
    assert charts["oom-map"].constant == "float32 · sdpa attention"
    assert "oom-map" not in hardware_rows.charts(hardware_rows.grid(hardware_rows.frontiers(confirmed=False)))


def test_positions_cover_the_generation_in_few_marks(charts):
    points = charts["step-positions"].panels[0].series[0].points
    assert len(points) <= hardware.PLACES
    assert points[0].x == 2.5  # the second and third token of 33
    assert points[-1].x == 32.5


def test_mean_and_peak_stand_side_by_side(charts):
    panels = charts["utilisation-batch"].panels
    assert [panel.title for panel in panels] == ["eager · mean", "eager · peak", "static · mean", "static · peak"]
    levels = [{point.y for one in panel.series for point in one.points} for panel in panels]
    assert levels == [{0.5}, {0.75}, {0.5}, {0.75}]
    assert "Mean: Utilisation" in charts["utilisation-batch"].alternative


def telemetry_of(grid, **values):
    """The grid with this telemetry in every row."""
    rows = [msgspec.structs.replace(row.row, telemetry=values) for row in grid.rows]
    return hardware_rows.charts(summaries.grid(rows, [], grid.sources, {}))


def test_rows_without_a_peak_have_their_mean_alone():
    chart = telemetry_of(hardware_rows.grid(), host_busy=0.5)["utilisation-batch"]
    assert [panel.title for panel in chart.panels] == ["eager", "static"]


def test_a_gpu_is_drawn_by_the_papers_counter_and_by_its_own():
    found = telemetry_of(hardware_rows.grid(), nvml_busy=0.9, nvml_busy_max=1.0, gpm_sm=0.3, host_busy=0.1)
    assert found["utilisation-batch"].y.title == "Time in which any kernel ran"
    assert [panel.title for panel in found["sm-batch"].panels] == ["eager", "static"]
    assert {point.y for one in found["sm-batch"].panels[0].series for point in one.points} == {0.3}


def test_devices_stand_beside_each_other():
    """Latency and utilisation of two devices in one report, a panel each."""
    rows = hardware_rows.rows()
    other = hardware_rows.cases.machine("NVIDIA L4", threads=4)
    more = [msgspec.structs.replace(row, environment=other.id) for row in rows]
    sources = {env.id: hardware_rows.cases_source(env) for env in (hardware_rows.cases.machine(), other)}
    found = hardware_rows.charts(summaries.grid([*rows, *more], [], sources, {}, shapes=hardware_rows.SHAPES))
    titles = [panel.title for panel in found["utilisation-batch"].panels]
    assert titles[:2] == ["eager · AMD EPYC 9254, 2026-11-22 · mean", "eager · AMD EPYC 9254, 2026-11-22 · peak"]
    assert len([title for title in titles if "NVIDIA L4" in title]) == 4


def test_energy_is_as_sampled(charts):
    assert [point.y for point in charts["energy-batch"].panels[0].series[0].points] == [2.0, 0.25, 0.03125]


def test_widths_are_shares_of_the_dense_model(charts):
    neurons = charts["layer-widths"].panels[0].series
    assert [one.subject for one in neurons] == ["m/flap-20"]
    assert [point.y for point in neurons[0].points] == pytest.approx([(300 - 20 * i) / 352 for i in range(12)])


def test_without_shapes_and_telemetry_there_are_no_such_figures():
    grid = hardware_rows.grid([])
    rows = [msgspec.structs.replace(row.row, telemetry={}, bounds=None) for row in grid.rows]
    found = hardware_rows.charts(summaries.grid(rows, [], grid.sources, {}))
    assert set(found) == {"speedup-parameters", "step-positions"}


@pytest.mark.parametrize("name", NAMES)
def test_what_is_drawn_is_in_the_csv_and_in_words(name, charts):
    chart = charts[name]
    assert delimited.chart(chart).count("\n") > 2
    assert chart.title in chart.alternative
    assert chart.source.startswith("AMD EPYC 9254")


@pytest.mark.parametrize("size", [draw.FILE, draw.NARROW], ids=lambda size: size.name)
@pytest.mark.parametrize("name", NAMES)
def test_no_two_labels_meet(name, size, charts):
    with canvas.drawing(name):
        sheet = draw.draw(charts[name], size)
        placed = boxes(sheet)
    page = Box(-1, 0, sheet.width + 1, sheet.height)
    for text, box in placed:
        assert box.inside(page), text
    for (one, a), (other, b) in itertools.combinations(placed, 2):
        assert not a.overlaps(b), (one, other)


def test_ticks_are_whole_where_things_are_counted_and_round_in_binary_units():
    assert forms._round(Axis("", "integer", linear=True), (0, 12.7)) == [0, 5, 10]
    assert forms._round(Axis("", "bytes", linear=True), (0, 45 * MIB)) == [0, *(x * MIB for x in (10, 20, 30, 40))]
