"""The four forms of a panel: lines, points, spans of batches, and bars of parts.

They draw on the sheet given and nowhere else.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import msgspec
from matplotlib.axes import Axes
from matplotlib.ticker import FixedFormatter, FixedLocator, NullLocator

from bench.report import quantities
from bench.report.figures import placement, ticks
from bench.report.figures.canvas import Sheet, fitting, measure
from bench.report.figures.placement import Box
from bench.report.palette import LIGHT, VERDICTS, marker
from bench.report.values import Axis, Bar, Chart, Panel, Point, Series, Span

if TYPE_CHECKING:
    from bench.report.figures.draw import Size

TITLE = 24.0  # room above a plot for its title
UNIT = 22.0  # and for the name of the upright axis
FOOT = 44.0  # and below, for tick labels and the name of the other axis
ROW = 42.0  # height of one subject among spans
LABEL_GAP = 16.5
STUB = 15.0  # pixels from a curve's end to its cross
WIDEST_LABEL = 150.0
VERDICT = 15.0  # size of a mark around a point


class Limits(msgspec.Struct, frozen=True):
    """Axis limits that panels share; `y` is None where every panel has its own."""

    x: tuple[float, float]
    y: tuple[float, float] | None


def height(chart: Chart, panel: Panel, plot: float, *, single: bool) -> float:
    """Return the pixels a panel needs from top to bottom."""
    if chart.form in ("spans", "bars"):
        return TITLE + ROW * (len(panel.spans) + len(panel.bars)) + FOOT + 6
    return TITLE + UNIT + plot * (1.15 if single and plot > 260 else 1.0) + FOOT


def shared_limits(chart: Chart) -> Limits:
    """Return limits over all panels, so that neighbours compare; perplexities of different texts do not."""
    if chart.form == "spans":
        return Limits(ticks.limits(chart.x.values, pad=0.7, least=4), None)
    if chart.form == "bars":
        totals = [sum(part.value for part in bar.parts) for panel in chart.panels for bar in panel.bars]
        return Limits(ticks.from_zero(totals), None)
    points = [point for panel in chart.panels for series in panel.series for point in series.points]
    guided = [place for panel in chart.panels for guide in panel.guides for place in guide.points]
    xs = [x for point in points for x in (point.x, *(point.x_interval or ()))] + [x for x, _ in guided]
    own = None if chart.form == "points" else _heights(chart, chart.panels)
    if chart.x.linear:
        return Limits(ticks.from_zero(xs), own)
    # Room at the left for the names of the diagonals, which stand beside the fastest points.
    x = ticks.limits(xs, pad=1.6 if chart.diagonals else 1.0 if not chart.x.values else 0.6)
    return Limits(x, own)


def _heights(chart: Chart, panels: Sequence[Panel]) -> tuple[float, float]:
    points = [point for panel in panels for series in panel.series for point in series.points]
    ys = [y for point in points for y in (point.y, *(point.y_interval or ()))]
    ys += [y for panel in panels for guide in panel.guides for _, y in guide.points]
    return ticks.from_zero(ys) if chart.y.linear else ticks.limits(ys)


def panel(sheet: Sheet, chart: Chart, panel: Panel, area: Box, size: Size, limits: Limits) -> None:
    """Draw one panel into its area of the sheet."""
    _title(sheet, panel, area, size)
    if chart.form == "spans":
        _draw_spans(sheet, chart, panel, area, size, limits)
    elif chart.form == "bars":
        _draw_bars(sheet, chart, panel, area, size, limits)
    else:
        _draw_curves(sheet, chart, panel, area, size, limits)


def _title(sheet: Sheet, panel: Panel, area: Box, size: Size) -> None:
    members: Sequence[Series | Span | Bar] = panel.series or panel.spans or panel.bars
    x, y = area.left + 1, area.top - 15
    if len({one.runtime for one in members}) == 1 and members[0].runtime:  # the title teaches the marker
        sheet.line([x + 5], [y + 4.5], "muted", marker=marker(members[0].runtime), markersize=6.5, linestyle="none")
        x += 16
    text = fitting(panel.title, size.font + 0.5, area.right - x, "bold")
    sheet.text(x, y, text, size=size.font + 0.5, weight="bold")


# -- curves and points -------------------------------------------------------------------------------------------------


def _draw_curves(sheet: Sheet, chart: Chart, panel: Panel, area: Box, size: Size, limits: Limits) -> None:
    y_limits = limits.y or _heights(chart, [panel])
    y_ticks = _round(chart.y, y_limits)
    y_labels = [quantities.tick(value, chart.y.unit) for value in y_ticks]
    left = area.left + max(measure(label, size.font - 1) for label in y_labels) + 9
    names = {one.subject: fitting(one.label, size.font, WIDEST_LABEL) for one in panel.series}
    gutter = max(measure(name, size.font) for name in names.values()) + 40 if size.gutter else 6
    frame = Box(left, area.bottom + FOOT, area.right - gutter, area.top - TITLE - UNIT)
    named = sheet.text(area.left + 1, area.top - TITLE - 12, chart.y.title, size=size.font - 0.5, colour="muted")
    label = " · ".join(guide.label for guide in panel.guides if guide.label)
    if label:
        label = fitting(label, size.font - 0.5, area.right - named - 14)
        sheet.text(area.right - 1, area.top - TITLE - 12, label, size=size.font - 0.5, align="right")
    axes = sheet.axes(frame)
    axes.set(
        xscale="linear" if chart.x.linear else "log", yscale="linear" if chart.y.linear else "log", xlim=limits.x,
        ylim=y_limits,
    )  # fmt: skip
    _upright(axes, y_ticks, y_labels, size)
    _level(sheet, axes, chart.x, frame, area, limits.x, size)
    for guide in panel.guides:
        xs, ys = zip(*guide.points, strict=True)
        axes.plot(xs, ys, color=LIGHT["muted"], linewidth=1.2, linestyle=(0, (4, 2)), zorder=1)
    if chart.diagonals:
        _draw_diagonals(sheet, axes, panel, frame, size, limits.x)
    below = covered(axes, panel.series) if chart.form == "lines" and not chart.x.linear else [0] * len(panel.series)
    for rank, series in reversed(list(enumerate(panel.series))):
        _draw_series(sheet, axes, chart, series, rank, min(below[rank], 3))
    if size.gutter:
        _draw_names(sheet, axes, panel, names, frame, size)


def _upright(axes: Axes, values: Sequence[float], labels: Sequence[str], size: Size) -> None:
    axes.yaxis.set(
        major_locator=FixedLocator(values), major_formatter=FixedFormatter(labels), minor_locator=NullLocator()
    )
    axes.tick_params(axis="y", length=0, pad=5, labelsize=size.font - 1, labelcolor=LIGHT["muted"])
    axes.grid(axis="y", color=LIGHT["rule"], linewidth=1)
    axes.set_axisbelow(True)


def _level(
    sheet: Sheet, axes: Axes, axis: Axis, frame: Box, area: Box, limits: tuple[float, float], size: Size
) -> None:
    """Put ticks where they have a meaning (batches that were measured) or are round, as many as fit."""
    values = [v for v in axis.values if limits[0] <= v <= limits[1]] or _round(axis, limits)
    labels = {value: quantities.tick(value, axis.unit) for value in values}
    widths = {value: measure(label, size.font - 1) for value, label in labels.items()}
    places = {value: float(axes.transData.transform((value, 1.0))[0]) for value in values}
    values = [v for v in values if area.left <= places[v] - widths[v] / 2 and places[v] + widths[v] / 2 <= area.right]
    kept = [values[i] for i in ticks.thin([places[v] for v in values], [widths[v] for v in values], 8)]
    axes.xaxis.set(
        major_locator=FixedLocator(kept), minor_locator=NullLocator(),
        major_formatter=FixedFormatter([labels[value] for value in kept]),
    )  # fmt: skip
    axes.tick_params(
        axis="x", length=4, color=LIGHT["guide"], pad=4, labelsize=size.font - 1, labelcolor=LIGHT["muted"]
    )
    title = fitting(axis.title, size.font - 0.5, frame.right - frame.left + 40)
    sheet.text(
        (frame.left + frame.right) / 2, frame.bottom - 37, title, size=size.font - 0.5, colour="muted", align="center"
    )


def _round(axis: Axis, limits: tuple[float, float]) -> list[float]:
    """Return round values for ticks: of bytes in their binary unit, of what is counted whole ones only."""
    scale = 1024 ** int(math.log(limits[1], 1024)) if axis.unit == "bytes" and limits[1] >= 1 else 1
    if not axis.linear:
        return [value * scale for value in ticks.logarithmic(limits[0] / scale, limits[1] / scale)]
    found = [value * scale for value in ticks.linear(limits[0] / scale, limits[1] / scale)]
    return [value for value in found if axis.unit != "integer" or value == int(value)]


def covered(axes: Axes, series: Sequence[Series]) -> list[int]:
    """Return how many earlier curves lie on each curve, within 3 pixels wherever both have a mark."""
    pixels = [
        {point.batch: axes.transData.transform((point.x, point.y)) for point in one.points} for one in series
    ]  # fmt: skip

    def same(i: int, j: int) -> bool:
        shared = pixels[i].keys() & pixels[j].keys()
        return bool(shared) and all(math.dist(pixels[i][batch], pixels[j][batch]) < 3 for batch in shared)

    return [sum(same(i, j) for j in range(i)) for i in range(len(series))]


def _draw_series(sheet: Sheet, axes: Axes, chart: Chart, series: Series, rank: int, below: int) -> None:
    """Draw one series under those of lower rank, wider by what covers it, so that curves that coincide are all seen."""
    colour, depth = LIGHT[series.colour], 10 - rank / 100
    for point in series.points:
        for xs, ys in _intervals(point):
            axes.plot(xs, ys, color=colour, linewidth=1.2, alpha=0.55, zorder=depth, solid_capstyle="butt")
    axes.plot(
        [point.x for point in series.points], [point.y for point in series.points], color=colour,
        linewidth=1.9 + 1.6 * below,
        linestyle="none" if chart.form == "points" else (0, (5, 2)) if series.simulated else "-",
        marker=marker(series.runtime), markersize=(8 if chart.form == "points" else 6) + 1.8 * below,
        **_face(series),
        zorder=depth + 0.01, clip_on=False, solid_joinstyle="round",
    )  # fmt: skip
    for place in series.changes:
        point = series.points[place]
        axes.plot(
            [point.x], [point.y], color=colour, marker="o", markersize=15, markerfacecolor="none",
            markeredgewidth=1.8, zorder=depth + 0.02, clip_on=False,
        )  # fmt: skip
    for place, verdict in series.verdicts:
        point = series.points[place]
        if verdict in VERDICTS:
            axes.plot(
                [point.x], [point.y], color=LIGHT["ink"], marker=VERDICTS[verdict], markersize=VERDICT,
                markerfacecolor="none", markeredgewidth=1.4, zorder=depth + 0.02, clip_on=False,
            )  # fmt: skip
    if series.oom is not None:
        (x0, y0), (x1, y1) = _end(axes, series), cross(axes, series)
        sheet.line([x0, x1], [y0, y1], series.colour, linestyle=(0, (1, 1.6)), linewidth=1.8)
        sheet.line([x1], [y1], series.colour, marker="x", markersize=7, markeredgewidth=2, linestyle="none")


def _face(one: Series | Span) -> dict[str, Any]:
    """Filled marks were measured, hollow ones simulated."""
    colour, paper = LIGHT[one.colour], LIGHT["paper"]
    if one.simulated:
        return {"markerfacecolor": paper, "markeredgecolor": colour, "markeredgewidth": 1.4}
    return {"markerfacecolor": colour, "markeredgecolor": paper, "markeredgewidth": 0.9}


def _intervals(point: Point) -> list[tuple[tuple[float, float], tuple[float, float]]]:
    bars: list[tuple[tuple[float, float], tuple[float, float]]] = []
    if point.x_interval is not None:
        bars.append((point.x_interval, (point.y, point.y)))
    if point.y_interval is not None:
        bars.append(((point.x, point.x), point.y_interval))
    return bars


def _end(axes: Axes, series: Series) -> tuple[float, float]:
    x, y = axes.transData.transform((series.points[-1].x, series.points[-1].y))
    return float(x), float(y)


def cross(axes: Axes, series: Series) -> tuple[float, float]:
    """Return the pixel of the cross after a curve's end, a few pixels on in the curve's last direction.

    It says that memory ended, not where: the next batch has no latency and so no place on the axes.
    """
    x1, y1 = _end(axes, series)
    if len(series.points) < 2:
        return x1 + STUB, y1
    x0, y0 = axes.transData.transform((series.points[-2].x, series.points[-2].y))
    length = math.hypot(x1 - x0, y1 - y0) or 1.0
    return float(x1 + STUB * (x1 - x0) / length), float(y1 + STUB * (y1 - y0) / length)


def _draw_names(sheet: Sheet, axes: Axes, panel: Panel, names: dict[str, str], frame: Box, size: Size) -> None:
    """Write each subject once in the gutter, beside its last mark, and lead there from it."""
    ends: dict[str, tuple[float, float]] = {}
    colour_of = {series.subject: series.colour for series in panel.series}
    for series in panel.series:
        x, y = cross(axes, series) if series.oom is not None else _end(axes, series)
        if series.subject not in ends or x > ends[series.subject][0]:
            ends[series.subject] = (x, y)
    wanted = [y for _, y in ends.values()]
    places = placement.spread(wanted, LABEL_GAP, frame.bottom + 4, frame.top - 4)
    for (subject, (x, y)), place in zip(ends.items(), places, strict=True):
        start, bend, stop = x + 6, max(x + 6, frame.right + 6), frame.right + 22
        xs, ys = ([start, bend, stop - 3], [y, y, place]) if abs(place - y) > 1 else ([start, stop - 3], [y, place])
        sheet.line(xs, ys, colour_of[subject], linewidth=1, alpha=0.7, linestyle=(0, (1, 2)))
        sheet.line([stop, stop + 9], [place, place], colour_of[subject], linewidth=3)
        sheet.text(stop + 14, place, names[subject], size=size.font, vertical="center_baseline")


def _draw_diagonals(
    sheet: Sheet, axes: Axes, panel: Panel, frame: Box, size: Size, limits: tuple[float, float]
) -> None:
    """Draw the line on which all points of a batch lie, and name it beside its fastest point."""
    by_batch: dict[int, list[Point]] = {}
    for series in panel.series:
        for point in series.points:
            by_batch.setdefault(point.batch, []).append(point)
    taken = [box for series in panel.series for box in _trace(axes, series)]
    for batch, points in sorted(by_batch.items()):
        tokens = points[0].x * points[0].y
        axes.plot(
            limits, [tokens / limits[0], tokens / limits[1]], color=LIGHT["guide"], linewidth=1,
            linestyle=(0, (1, 2.5)), zorder=1,
        )  # fmt: skip
        label = f"M={batch:,}"
        fast = min(points, key=lambda point: point.x)
        slow = max(points, key=lambda point: point.x)
        candidates = _beside(axes, fast, slow, measure(label, size.font - 1.5), size.font - 1.5)
        box = placement.free(candidates, taken, frame)
        if box is not None:
            taken.append(box)
            sheet.text(box.left, box.bottom + 2, label, size=size.font - 1.5, colour="muted")


def _beside(axes: Axes, fast: Point, slow: Point, width: float, font: float) -> list[Box]:
    """Return boxes for a label along the diagonal: up-left from the fastest point, then down-right from the slowest."""
    x, y = axes.transData.transform((fast.x, fast.y))
    u, v = axes.transData.transform((slow.x, slow.y))
    boxes: list[Box] = []
    for away in (6.0, 10.0, 16.0, 24.0, 34.0):
        boxes.append(Box(x - away - width, y + away * 0.6, x - away, y + away * 0.6 + font + 2))
        boxes.append(Box(x - width / 2, y + away, x + width / 2, y + away + font + 2))
        boxes.append(Box(u + away, v - away * 0.6 - font - 2, u + away + width, v - away * 0.6))
    return boxes


def _trace(axes: Axes, series: Series) -> list[Box]:
    """Return small boxes along a curve and its cross, for labels to keep off."""
    pixels = [tuple(map(float, axes.transData.transform((point.x, point.y)))) for point in series.points]
    if series.oom is not None:
        pixels.append(cross(axes, series))
    judged = {place for place, _ in series.verdicts}
    rooms = [VERDICT / 2 + 3 if place in judged else 5.0 for place in range(len(pixels))]
    boxes = [Box(x - r, y - r, x + r, y + r) for (x, y), r in zip(pixels, rooms, strict=True)]
    for (x0, y0), (x1, y1) in pairwise(pixels):
        steps = max(1, int(math.hypot(x1 - x0, y1 - y0) / 5))
        for i in range(steps):
            x, y = x0 + (x1 - x0) * i / steps, y0 + (y1 - y0) * i / steps
            boxes.append(Box(x - 2, y - 2, x + 2, y + 2))
    return boxes


# -- spans -------------------------------------------------------------------------------------------------------------


def _draw_spans(sheet: Sheet, chart: Chart, panel: Panel, area: Box, size: Size, limits: Limits) -> None:
    frame = Box(area.left + 8, area.bottom + FOOT, area.right - 8, area.top - TITLE)
    axes = sheet.axes(frame)
    axes.set(xscale="log", xlim=limits.x, ylim=(0, 1))
    axes.yaxis.set_visible(False)
    _level(sheet, axes, chart.x, frame, area, limits.x, size)
    rules = [float(axes.transData.transform((value, 0.5))[0]) for value in axes.xaxis.get_majorticklocs()]
    for index, span in enumerate(panel.spans):
        base = frame.top - ROW * index
        note_width = measure(span.note, size.font - 1)
        sheet.text(frame.right, base - 17, span.note, size=size.font - 1, colour="muted", align="right")
        name = fitting(span.label, size.font, frame.right - frame.left - note_width - 14)
        sheet.text(frame.left, base - 17, name, size=size.font)
        for x in rules:  # only beside the bars: a rule through the whole panel would cross the words
            sheet.line([x, x], [base - 36, base - 24], "rule", linewidth=1, zorder=0)
        _draw_span(sheet, axes, span, base - 30, frame)


def _draw_span(sheet: Sheet, axes: Axes, span: Span, y: float, frame: Box) -> None:
    def place(batch: float) -> float:
        return float(axes.transData.transform((batch, 0.5))[0])

    fits = frame.left if span.fits is None else place(span.fits)
    fails = frame.right if span.fails is None else place(span.fails)
    if span.fits is not None:
        sheet.line([frame.left, fits], [y, y], span.colour, linewidth=4, solid_capstyle="butt")
    if span.fails is None:
        sheet.line([fits, fails - 4], [y, y], span.colour, linewidth=1.6)
        sheet.line([fails - 4], [y], span.colour, marker=">", markersize=6, linestyle="none")
    else:
        sheet.line([fits, fails], [y, y], span.colour, linewidth=1.6, linestyle=(0, (1, 1.8)))
        sheet.line([fails], [y], span.colour, marker="x", markersize=7.5, markeredgewidth=2.2, linestyle="none")
    if span.fits is not None:
        style = {**_face(span), "marker": marker(span.runtime), "markersize": 8.5, "linestyle": "none"}
        sheet.line([fits], [y], span.colour, **style)


# -- bars --------------------------------------------------------------------------------------------------------------


def _draw_bars(sheet: Sheet, chart: Chart, panel: Panel, area: Box, size: Size, limits: Limits) -> None:
    """One bar a subject, its name and total above it, its parts side by side with a hair of paper between them."""
    frame = Box(area.left + 8, area.bottom + FOOT, area.right - 8, area.top - TITLE)
    axes = sheet.axes(frame)
    axes.set(xscale="linear", xlim=limits.x, ylim=(0, 1))
    axes.yaxis.set_visible(False)
    _level(sheet, axes, chart.x, frame, area, limits.x, size)
    for index, bar in enumerate(panel.bars):
        base = frame.top - ROW * index
        note = measure(bar.note, size.font - 1)
        sheet.text(frame.right, base - 17, bar.note, size=size.font - 1, colour="muted", align="right")
        name = fitting(bar.label, size.font, frame.right - frame.left - note - 14)
        sheet.text(frame.left, base - 17, name, size=size.font)
        start = 0.0
        for part in bar.parts:
            ends = [float(axes.transData.transform((x, 0.5))[0]) for x in (start, start + part.value)]
            if ends[1] - ends[0] > 1:
                shown = [ends[0], ends[1] - 1]
                sheet.line(shown, [base - 30, base - 30], part.colour, linewidth=10, solid_capstyle="butt")
            start += part.value
