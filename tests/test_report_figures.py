"""Figures: ticks and label places as arithmetic, colours for all eyes, and no two labels that meet in any drawing."""

from __future__ import annotations

import itertools
import math
import re

import numpy as np
import pytest
import report_cases as cases
from hypothesis import given
from hypothesis import strategies as st

from bench.report import build, palette
from bench.report.figures import canvas, draw, pictures, placement, ticks, vector
from bench.report.figures.placement import Box

# -- ticks -------------------------------------------------------------------------------------------------------------

positive = st.floats(1e-6, 1e9)


@given(positive, st.floats(1.01, 1e6))
def test_log_ticks_are_inside_ascending_and_enough(low, span):
    found = ticks.logarithmic(low, low * span)
    assert found == sorted(set(found))
    assert all(low <= value <= low * span * (1 + 1e-12) for value in found)
    assert 3 <= len(found) <= 16


@given(st.lists(positive, min_size=1, max_size=9))
def test_limits_hold_all_values_with_room(values):
    low, high = ticks.limits(values)
    assert low < min(values)
    assert high > max(values)
    assert high / low >= 1.6


@given(st.lists(st.tuples(st.floats(0, 500), st.floats(5, 60)), max_size=15), st.floats(0, 20))
def test_thinned_labels_do_not_meet(labels, gap):
    labels = sorted(labels)
    places, widths = [place for place, _ in labels], [width for _, width in labels]
    kept = ticks.thin(places, widths, gap)
    for a, b in itertools.pairwise(kept):
        assert places[b] - places[a] >= (widths[a] + widths[b]) / 2 + gap - 1e-9
    assert bool(kept) == bool(labels)


# -- places ------------------------------------------------------------------------------------------------------------


@given(st.lists(st.floats(-50, 350), min_size=1, max_size=20), st.floats(1, 20))
def test_spread_keeps_gap_range_and_order(wanted, gap):
    placed = placement.spread(wanted, gap, 0, 300)
    if gap * (len(wanted) - 1) <= 300:
        assert all(b - a >= gap - 1e-6 for a, b in itertools.pairwise(sorted(placed)))
    assert all(-1e-6 <= value <= 300 + 1e-6 for value in placed)
    for (a, x), (b, y) in itertools.combinations(zip(wanted, placed, strict=True), 2):
        assert (a - b) * (x - y) >= 0


@given(st.lists(st.floats(0, 300), min_size=2, max_size=6), st.floats(5, 40))
def test_spread_moves_as_little_as_possible(wanted, gap):
    """Against brute force: no feasible arrangement reached by moving any label a little is better."""
    placed = placement.spread(wanted, gap, -1000, 1000)

    def cost(values):
        return sum((a - b) ** 2 for a, b in zip(wanted, values, strict=True))

    noise = np.random.default_rng(0)
    for _ in range(200):
        other = np.sort(np.array(placed) + noise.normal(0, 3, len(placed)))
        other = other[np.argsort(np.argsort(placed, kind="stable"), kind="stable")]
        if all(b - a >= gap for a, b in itertools.pairwise(sorted(other))):
            assert cost(placed) <= cost(list(other)) + 1e-6


def test_spread_leaves_alone_what_does_not_collide():
    assert placement.spread([30.0, 10.0, 90.0], 15, 0, 100) == [30.0, 10.0, 90.0]


@given(st.lists(st.floats(1, 400), max_size=12), st.floats(50, 300))
def test_key_rows_fit_and_keep_the_order(widths, available):
    rows = placement.rows(widths, available, 10)
    assert [i for row in rows for i in row] == list(range(len(widths)))
    for row in rows:
        assert len(row) == 1 or sum(widths[i] for i in row) + 10 * (len(row) - 1) <= available + 1e-9


# -- colours -----------------------------------------------------------------------------------------------------------

# Machado, Oliveira and Fernandes, IEEE TVCG 15 (2009), severity 1.0, on linear RGB.
BLINDNESS = {
    "none": np.eye(3),
    "protan": np.array(
        [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]]
    ),
    "deutan": np.array(
        [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]]
    ),
    "tritan": np.array(
        [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]]
    ),
}  # fmt: skip


def linear(colour: str) -> np.ndarray:
    values = np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


def lab(rgb: np.ndarray) -> np.ndarray:
    to_xyz = np.array(
        [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]]
    )
    xyz = to_xyz @ np.clip(rgb, 0, 1) / np.array([0.95047, 1.0, 1.08883])
    f = np.where(xyz > 216 / 24389, np.cbrt(xyz), (24389 / 27 * xyz + 16) / 116)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


def contrast(one: str, other: str) -> float:
    a, b = sorted(float(linear(c) @ [0.2126, 0.7152, 0.0722]) for c in (one, other))
    return (b + 0.05) / (a + 0.05)


SERIES = ["dense", *palette.FAMILIES["depth"], *palette.FAMILIES["width"], "other-1", "other-2", "other-3"]


@pytest.mark.parametrize("theme", [palette.LIGHT, palette.DARK], ids=["light", "dark"])
def test_colours_stand_out_from_the_paper(theme):
    assert set(theme) == set(palette.LIGHT)
    for name in SERIES:
        assert contrast(theme[name], theme["paper"]) >= 3, name
    for name in ("ink", "muted"):
        assert contrast(theme[name], theme["paper"]) >= 4.5, name


@pytest.mark.parametrize("theme", [palette.LIGHT, palette.DARK], ids=["light", "dark"])
@pytest.mark.parametrize("eyes", BLINDNESS)
def test_the_first_colours_of_each_kind_differ_for_all_eyes(theme, eyes):
    """Dense and the first three of each kind; 10 in CIELAB is plain to see side by side."""
    shown = ["dense", *palette.FAMILIES["depth"][:3], *palette.FAMILIES["width"][:3]]
    seen = {name: lab(BLINDNESS[eyes] @ linear(theme[name])) for name in shown}
    for one, other in itertools.combinations(shown, 2):
        assert np.linalg.norm(seen[one] - seen[other]) > 18, (one, other)


def test_every_light_colour_has_one_name():
    assert len(set(palette.LIGHT.values())) == len(palette.LIGHT)


@pytest.mark.parametrize(
    ("subject", "expected"),
    [
        ("m/depth-26", "depth"), ("m/depth:26", "depth"), ("m/ppl:0.25", "depth"), ("m/taylor+:0.2", "depth"),
        ("m/wanda-sp-20", "width"), ("m/wanda-sp:0.2", "width"), ("m/width:24x8256@4-30", "width"),
        ("m/flap:26.9+-7.5x8577+-2078", "width"), ("m/llm-pruner-35", "width"), ("./folder", "other"),
        ("m/mag:0.2", "depth"), ("m/mag-sp:0.2", "width"), ("m/depthless", "other"),
    ],
)  # fmt: skip
def test_kinds(subject, expected):
    assert palette.kind(subject, dense=False) == expected


def test_colours_are_distinct_until_a_family_runs_out():
    chosen = palette.colours(
        [("m", True), *((f"m/depth-{i}", False) for i in range(4)), *((f"./{i}", False) for i in range(5))]
    )
    assert len(set(chosen.values())) == 10


# -- drawings ----------------------------------------------------------------------------------------------------------

CASES = {
    "quick": lambda: build([cases.quick()[0]], cases.quick()[1]),
    "llama": lambda: build([cases.llama()[0]], cases.llama()[1]),
    "hostile": lambda: build([cases.hostile()[0]], cases.hostile()[1]),
    "only oom": lambda: build([cases.only_oom()]),
    "troubled": lambda: build([cases.troubled()]),
    "two devices": lambda: build(list(cases.two_devices())),
    "many": lambda: build([cases.sweep(
        {"m": (12, 9e6, 10), **{f"m/depth-{i}": (i, 1e6 * i, i) for i in range(1, 14)}},
        {"eager": 1.0}, tuple(2**i for i in range(11)), limit=3e7, kv=200.0,
    )]),
}  # fmt: skip


def boxes(sheet: canvas.Sheet) -> list[tuple[str, Box]]:
    """Every text of a drawing with its extent in pixels, as matplotlib's own renderer measures it."""
    import matplotlib.text

    sheet.figure.canvas.draw()
    renderer = canvas._renderer()
    found = []
    for text in sheet.figure.findobj(matplotlib.text.Text):
        if text.get_visible() and text.get_text().strip() and in_use(text):
            extent = text.get_window_extent(renderer)
            found.append((text.get_text(), Box(extent.x0 + 0.5, extent.y0 + 1, extent.x1 - 0.5, extent.y1 - 1)))
    return found


def in_use(text) -> bool:
    """Axes keep label objects of hidden axes; those are never drawn."""
    axes = text.axes
    if axes is None:
        return True
    shown = [label for axis in (axes.xaxis, axes.yaxis) if axis.get_visible() for label in axis.get_ticklabels()]
    return any(text is label for label in shown)


@pytest.mark.parametrize("size", [draw.FILE, draw.WIDE, draw.NARROW], ids=lambda size: size.name)
@pytest.mark.parametrize("case", CASES)
def test_no_two_labels_meet_and_none_is_cut_off(case, size):
    for chart in CASES[case]().charts:
        with canvas.drawing(chart.name):
            sheet = draw.draw(chart, size)
            placed = boxes(sheet)
        page = Box(0, 0, sheet.width, sheet.height)
        assert len(placed) > 5
        for text, box in placed:
            assert box.inside(page), (chart.name, text)
        for (one, a), (other, b) in itertools.combinations(placed, 2):
            assert not a.overlaps(b), (chart.name, one, other)


def test_the_overlap_check_can_fail():
    with canvas.drawing("x"):
        sheet = canvas.Sheet(200, 100)
        sheet.text(10, 50, "one", size=12)
        sheet.text(20, 52, "two", size=12)
        (_, a), (_, b) = boxes(sheet)
    assert a.overlaps(b)


def test_batches_are_named_on_the_trade_off():
    chart = CASES["llama"]().charts[0]
    with canvas.drawing("x"):
        texts = [text for text, _ in boxes(draw.draw(chart, draw.WIDE))]
    for batch in (1, 4, 16, 64):
        assert texts.count(f"M={batch}") == len(chart.panels)


def test_pictures_are_reproducible_and_a_user_style_does_not_reach_them():
    import matplotlib

    chart = CASES["quick"]().charts[0]
    first = pictures.render(chart)
    with matplotlib.rc_context({"font.size": 30, "axes.facecolor": "red", "svg.fonttype": "path"}):
        assert pictures.render(chart) == first
    assert matplotlib.rcParams["text.parse_math"]


@pytest.mark.parametrize("case", ["quick", "hostile"])
def test_inline_drawings_follow_the_page(case):
    """Colours by the page's variables, the page's font, real text, and no id twice in a whole page."""
    ids: list[str] = []
    for chart in CASES[case]().charts:
        picture = pictures.render(chart)
        for svg in (picture.wide, picture.narrow):
            inline = vector.inline(svg, style="x", label="a label")
            assert not re.findall(r"#[0-9a-f]{6}\b(?!\")", re.sub(r'(href|clip-path)="[^"]*"', "", inline))
            assert "font-family" not in inline
            assert "<style" not in inline
            assert "var(--ink)" in inline
            assert inline.count("<text") > 5
            assert inline.startswith("<svg")
            assert inline.endswith("</svg>")
            ids += re.findall(r'\bid="([^"]*)"', inline)
    assert len(set(ids)) == len(ids) > 0


def test_files_name_device_and_date_in_the_picture():
    for chart in CASES["two devices"]().charts:
        svg = pictures.render(chart).svg
        assert "2026-11-22" in svg
        assert "NVIDIA L4 · simulated" in svg
        assert chart.title in svg


def test_wide_scripts_are_given_room():
    with canvas.drawing("x"):  # which keeps quiet about characters that the measuring font lacks
        assert canvas.measure("模型", 12) >= 2 * 12
        assert canvas.measure(canvas.fitting("very-long-" * 20, 12, 100), 12) <= 100
        assert canvas.fitting("short", 12, 100) == "short"
        assert math.isclose(canvas.measure("ab", 12), canvas.measure("a", 12) + canvas.measure("b", 12), rel_tol=0.2)
