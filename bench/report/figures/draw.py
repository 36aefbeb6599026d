"""A Chart on a sheet: heading, key, panels in a grid. Sizes are rows of data: for files, wide screens and phones.

Every label's place is computed before anything is drawn; a test checks that no two texts of a figure meet.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from bench.report.figures import forms, placement
from bench.report.figures.canvas import Sheet, fitting, measure
from bench.report.figures.placement import Box
from bench.report.palette import VERDICTS, marker
from bench.report.values import Chart, Series, Span

GAP = 30.0  # between panels


class Size(msgspec.Struct, frozen=True):
    """`columns`: panels side by side at most; `gutter`: names beside the curves, else in a key above; in pixels."""

    name: str
    width: float
    columns: int
    font: float
    plot: float
    gutter: bool
    heading: bool = False


WIDE = Size("wide", 900, 2, 12.5, 270, gutter=True)
NARROW = Size("narrow", 358, 1, 12, 250, gutter=False)
FILE = Size("file", 900, 2, 12.5, 270, gutter=True, heading=True)


def draw(chart: Chart, size: Size) -> Sheet:
    """Return the chart on a sheet; call inside `canvas.drawing`."""
    columns = min(size.columns, len(chart.panels))
    rows = -(-len(chart.panels) // columns)
    width = (size.width - GAP * (columns - 1)) / columns
    grid = [chart.panels[row * columns : (row + 1) * columns] for row in range(rows)]
    heights = [max(forms.height(chart, panel, size.plot, single=columns == 1) for panel in row) for row in grid]
    key = _key(chart, size)
    heading = _heading(chart, size)
    top_part = sum(6 + line[1] for line in heading) + (22 * len(key) + 8 if key else 0) + (10 if heading else 0)
    bottom_part = 4.0
    total = top_part + sum(heights) + GAP * 0.6 * (rows - 1) + bottom_part
    sheet = Sheet(size.width, total)
    y = _write_heading(sheet, heading, total)
    y = _write_key(sheet, key, y, size)
    scale = forms.shared_limits(chart)
    for row, height in zip(grid, heights, strict=True):
        for column, panel in enumerate(row):
            left = column * (width + GAP)
            forms.panel(sheet, chart, panel, Box(left, y - height, left + width, y), size, scale)
        y -= height + GAP * 0.6
    return sheet


def _heading(chart: Chart, size: Size) -> list[tuple[str, float, str, str]]:
    """Return (text, size, colour, weight) lines of a figure that stands alone; on a page the page says these things."""
    if not size.heading:
        return []
    lines = [(chart.title, 17.0, "ink", "bold")]
    made = "; ".join(dict.fromkeys(one.made for one in chart.origins[:2]))
    facts = (chart.constant, chart.source, made, chart.left_out)
    lines += [(text, 12.0, "muted", "normal") for text in facts if text]
    return [(fitting(text, font, size.width - 4, weight), font, colour, weight) for text, font, colour, weight in lines]


def _write_heading(sheet: Sheet, heading: Sequence[tuple[str, float, str, str]], y: float) -> float:
    for text, font, colour, weight in heading:
        y -= font
        sheet.text(1, y, text, size=font, colour=colour, weight=weight)
        y -= 6
    return y - (10 if heading else 0)


class KeyItem(msgspec.Struct, frozen=True):
    """One entry of the key: a subject or a part by colour, or a runtime by marker; a verdict's mark is `hollow`."""

    label: str
    colour: str
    marker: str
    hollow: bool = False


def _key(chart: Chart, size: Size) -> list[list[KeyItem]]:
    """Return the rows of the key: runtimes where markers tell them apart, subjects where there is no gutter."""
    members: list[Series | Span] = [one for panel in chart.panels for one in (*panel.series, *panel.spans)]
    kinds = dict.fromkeys((one.runtime, one.simulated) for one in members)
    runtimes = [
        KeyItem(f"{name} (simulated)" if simulated else name, "muted", marker(name)) for name, simulated in kinds
    ]
    named = {one.subject: one for one in members}.values()
    room = size.width - 40
    subjects = [KeyItem(fitting(one.label, size.font, room), one.colour, "") for one in named]
    parts = {p.label: p for panel in chart.panels for bar in panel.bars for p in bar.parts}.values()
    if parts:
        return _rows([KeyItem(part.label, part.colour, "") for part in parts], size)
    shown = [runtimes] if chart.form == "points" and len(kinds) > 1 else []
    shown += [subjects] if not size.gutter and chart.form != "spans" else []
    shown += [_verdicts(chart)]
    return [row for items in shown for row in _rows(items, size)]


def _verdicts(chart: Chart) -> list[KeyItem]:
    """What the marks around points say: verdicts, and the new levels of a history."""
    series = [one for panel in chart.panels for one in panel.series]
    seen = {verdict for one in series for _, verdict in one.verdicts}
    found = [KeyItem(verdict, "ink", mark, hollow=True) for verdict, mark in VERDICTS.items() if verdict in seen]
    return [*found, *([KeyItem(chart.ring, "muted", "o", hollow=True)] if any(s.changes for s in series) else [])]


def _rows(items: Sequence[KeyItem], size: Size) -> list[list[KeyItem]]:
    widths = [26 + measure(item.label, size.font) for item in items]
    return [[items[i] for i in row] for row in placement.rows(widths, size.width, 14)]


def _write_key(sheet: Sheet, key: Sequence[Sequence[KeyItem]], y: float, size: Size) -> float:
    for row in key:
        y -= 22
        x = 1.0
        for item in row:
            middle = y + 8
            if not item.marker:
                sheet.line([x, x + 18], [middle, middle], item.colour, linewidth=3, solid_capstyle="round")
            else:
                face = {"markerfacecolor": "none", "markersize": 11} if item.hollow else {"markersize": 7}
                sheet.line([x + 9], [middle], item.colour, marker=item.marker, linestyle="none", **face)
            x = sheet.text(x + 25, y + 4, item.label, size=size.font) + 14
    return y - (8 if key else 0)
