"""The figures as data: one small function a figure, from the Grid to a Chart. Pure; knows nothing of pixels.

A new figure is one function and one row in CHARTS. A function returns None where the results hold nothing for it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

import msgspec

from bench.report import quantities, settings
from bench.report.palette import colours
from bench.report.sources import combine
from bench.report.summaries import Grid, Group, Setting, Summary
from bench.report.values import Axis, Chart, Panel, Point, Series, Span
from bench.timing import Estimate

PANEL_LIMIT = 12
_VERDICTS = "Marks around points of the later run are the gate's verdicts on its latency against the earlier."
SERIES_LIMIT = 12


class Style(msgspec.Struct, frozen=True):
    """How every figure names and colours the subjects; made once a report."""

    colours: Mapping[str, str]
    labels: Mapping[str, str]


Builder: TypeAlias = Callable[[Grid, Style], Chart | None]


def charts(grid: Grid, builders: Sequence[Builder]) -> tuple[Chart, ...]:
    """Return every figure that the results hold something for, in the order of `builders`."""
    style = Style(colours([(s, s in grid.dense) for s in grid.subjects]), grid.labels)
    made = (build(grid, style) for build in builders)
    return tuple(chart for chart in made if chart is not None)


# -- the figures -------------------------------------------------------------------------------------------------------


def latency_throughput(grid: Grid, style: Style) -> Chart | None:
    """The trade-off, one curve over batch a subject (Shortened LLaMA, arXiv 2402.02834, Figures 1 right and 6)."""

    def point(cell: Summary) -> Point:
        return Point(value_of(cell.call_s), value_of(cell.throughput), cell.cell.batch, ends(cell.call_s))

    return line_chart(
        grid, style, point, judged=True, name="latency-throughput", title="Latency against throughput",
        x=Axis(_latency_title(grid), "s"), y=Axis("Throughput (tokens/s)", "tokens/s"),
        reading="Up and to the left is better. Points of one batch size M lie on one dotted line. "
        "A cross ends a curve where the next batch ran out of memory.",
    )  # fmt: skip


def latency_batch(grid: Grid, style: Style) -> Chart | None:
    """Seconds a call against batch."""

    def point(cell: Summary) -> Point:
        return Point(cell.cell.batch, value_of(cell.call_s), cell.cell.batch, None, ends(cell.call_s))

    return line_chart(
        grid, style, point, judged=True, name="latency-batch", title="Latency against batch size",
        x=Axis("Batch size", "integer", batches(grid)), y=Axis(_latency_title(grid), "s"),
        reading="Lower is better. Flat curves mean that a larger batch costs nothing yet. "
        "A cross ends a curve where the next batch ran out of memory.",
    )  # fmt: skip


def throughput_batch(grid: Grid, style: Style) -> Chart | None:
    """New tokens a second, all sequences together, against batch."""

    def point(cell: Summary) -> Point:
        return Point(cell.cell.batch, value_of(cell.throughput), cell.cell.batch, None, ends(cell.throughput))

    return line_chart(
        grid, style, point, judged=True, name="throughput-batch", title="Throughput against batch size",
        x=Axis("Batch size", "integer", batches(grid)), y=Axis("Throughput (tokens/s)", "tokens/s"),
        reading="Higher is better. Where a curve flattens, a larger batch only adds latency. "
        "A cross ends a curve where the next batch ran out of memory.",
    )  # fmt: skip


def perplexity_latency(grid: Grid, style: Style) -> Chart | None:
    """Quality against speed, one point a subject and runtime (the paper's Figure 1 left)."""
    names = dict.fromkeys(name for values in grid.perplexity.values() for name in values)
    families: dict[Setting, list[Setting]] = {}
    for setting in grid.groups:  # runtimes share a panel: markers tell them apart
        families.setdefault(msgspec.structs.replace(setting, runtime="", simulated=False), []).append(setting)
    panels: list[Panel] = []
    used: list[Setting] = []
    titles, constant = settings.split(list(families), grid.sources)
    batches: set[int] = set()
    for source in names:
        for family, members in families.items():
            series, batch = _quality_series(grid, style, source, members)
            if series:
                panels.append(Panel(" · ".join(part for part in (f"on {source}", titles[family]) if part), series))
                used += members
                batches.add(batch)
    if not panels:
        return None
    constant = " · ".join([constant, *([f"batch {min(batches)}"] if len(batches) == 1 else [])])
    return make(
        grid, panels, used, constant, name="perplexity-latency", title="Perplexity against latency", form="points",
        x=Axis(_latency_title(grid), "s"), y=Axis("Perplexity", "number"),
        reading="Down and to the left is better. One point for each runtime; the label names the subject.",
    )  # fmt: skip


def oom_frontier(grid: Grid, style: Style) -> Chart | None:
    """The batch at which memory ends, from both sides."""
    found: dict[Setting, tuple[Span, ...]] = {}
    for setting, groups in grid.groups.items():
        spans = tuple(_span(group, style) for group in groups.values() if group.fits or group.fails)
        if any(span.fails is not None for span in spans):
            found[setting] = spans
    if not found:
        return None
    titles, constant = settings.split(found, grid.sources)
    panels = [Panel(titles[setting], spans=spans[:SERIES_LIMIT]) for setting, spans in found.items()]
    values = {float(v) for spans in found.values() for span in spans for v in (span.fits, span.fails) if v}
    values |= {float(cell.cell.batch) for s in found for group in grid.groups[s].values() for cell in group.cells}
    return make(
        grid, panels, list(found), constant, name="oom-frontier", title="Where memory ends", form="spans",
        x=Axis("Batch size", "integer", tuple(sorted(values))), y=Axis("", "text"),
        reading="The dot is the largest batch that fits, the cross the smallest that runs out of memory; "
        "the end lies on the dotted line between them. An arrow means that memory did not end.",
    )  # fmt: skip


CHARTS: tuple[Builder, ...] = (
    latency_throughput,
    perplexity_latency,
    latency_batch,
    throughput_batch,
    oom_frontier,
)


# -- shared parts ------------------------------------------------------------------------------------------------------


def line_chart(
    grid: Grid,
    style: Style,
    point: Callable[[Summary], Point],
    *,
    name: str,
    title: str,
    x: Axis,
    y: Axis,
    reading: str,
    judged: bool = False,
) -> Chart | None:
    """One panel a setting, one series a subject; with `judged`, the verdicts of the gate on its points."""
    found: dict[Setting, tuple[Series, ...]] = {}
    for setting, groups in grid.groups.items():
        series = tuple(curve(group, style, point) for group in groups.values() if group.measured)
        series = tuple(_judged(grid, setting, one) for one in series) if judged else series
        if series:
            found[setting] = series
    if sum(len(one.points) for series in found.values() for one in series) < 2:
        return None  # one number is no figure
    titles, constant = settings.split(found, grid.sources)
    panels = [Panel(titles[setting], series[:SERIES_LIMIT]) for setting, series in found.items()]
    return make(
        grid, panels, list(found), constant, name=name, title=title, form="lines", x=x, y=y, reading=reading
    )  # fmt: skip


def _judged(grid: Grid, setting: Setting, one: Series) -> Series:
    if not grid.verdicts:
        return one
    known = [(i, grid.verdicts.get((setting, one.subject, p.batch))) for i, p in enumerate(one.points)]
    return msgspec.structs.replace(one, verdicts=tuple((i, verdict) for i, verdict in known if verdict))


def make(
    grid: Grid, panels: Sequence[Panel], used: Sequence[Setting], constant: str, *, name: str, title: str, form: str,
    x: Axis, y: Axis, reading: str,
) -> Chart:  # fmt: skip
    """Cut the panels to what a page can hold, and add what every figure says of itself."""
    environments = dict.fromkeys(setting.environment for setting in used)
    simulated = any(setting.simulated for setting in used)
    return Chart(
        name=name,
        title=title,
        form=form,  # pyright: ignore[reportArgumentType]
        x=x,
        y=y,
        panels=tuple(panels[:PANEL_LIMIT]),
        source=combine([grid.sources[e] for e in environments if e in grid.sources], simulated=simulated),
        reading=f"{reading} {_VERDICTS}" if any(one.verdicts for panel in panels for one in panel.series) else reading,
        alternative=_alternative(title, x, y, panels[:PANEL_LIMIT]),
        simulated=simulated,
        diagonals=name == "latency-throughput",
        left_out=_left_out(grid, panels),
        constant=constant.strip(" ·"),
        origins=tuple(grid.sources[e] for e in environments if e in grid.sources),
    )


def _left_out(grid: Grid, panels: Sequence[Panel]) -> str:
    parts: list[str] = []
    if len(panels) > PANEL_LIMIT:
        parts.append(f"{len(panels) - PANEL_LIMIT} of {len(panels)} settings")
    if len(grid.subjects) > SERIES_LIMIT and any(
        max(len(panel.series), len(panel.spans), len(panel.bars)) >= SERIES_LIMIT for panel in panels
    ):
        parts.append(f"subjects beyond the first {SERIES_LIMIT} of {len(grid.subjects)}")
    return f"Not drawn: {' and '.join(parts)}; the tables have them all." if parts else ""


def curve(group: Group, style: Style, point: Callable[[Summary], Point]) -> Series:
    """Return one subject's marks, one a measured cell, and where memory ended after them."""
    points = tuple(point(cell) for cell in group.measured)
    last = points[-1].batch
    oom = group.fails if group.fails is not None and group.fails > last else None
    setting = group.setting
    return Series(
        group.subject, style.labels[group.subject], style.colours[group.subject], setting.runtime, setting.simulated,
        points, oom,
    )  # fmt: skip


def _quality_series(
    grid: Grid, style: Style, source: str, members: Sequence[Setting]
) -> tuple[tuple[Series, ...], int]:
    """One point for each evaluated subject and runtime, at the batch that most of them share."""
    groups = [
        group for setting in members for subject, group in grid.groups[setting].items()
        if group.measured and source in grid.perplexity.get(subject, {})
    ]  # fmt: skip
    counted = Counter(cell.cell.batch for group in groups for cell in group.measured)
    if not counted:
        return (), 0
    batch = min(counted, key=lambda value: (-counted[value], value))

    def point(cell: Summary) -> Point:
        perplexity = grid.perplexity[cell.cell.subject][source].perplexity
        return Point(value_of(cell.call_s), perplexity, batch, ends(cell.call_s))

    series: list[Series] = []
    kept = dict.fromkeys(group.subject for group in groups)
    for group in groups:
        cells = tuple(cell for cell in group.measured if cell.cell.batch == batch)
        if cells and group.subject in list(kept)[:SERIES_LIMIT]:
            series.append(msgspec.structs.replace(curve(group, style, point), points=(point(cells[0]),), oom=None))
    return tuple(series), batch


def _span(group: Group, style: Style) -> Span:
    fits, fails = group.fits, group.fails
    if fits is None:
        note = f"{fails:,} does not fit"
    elif fails is None:
        note = f"{fits:,} fits, no end seen"
    else:
        note = f"{fits:,} fits, {fails:,} does not"
    setting = group.setting
    return Span(
        group.subject, style.labels[group.subject], style.colours[group.subject], setting.runtime, setting.simulated,
        fits, fails, note,
    )  # fmt: skip


def value_of(estimate: Estimate | None) -> float:
    """Return the estimate's value; only for cells that were measured."""
    assert estimate is not None, "only measured cells are drawn"
    return estimate.value


def ends(estimate: Estimate | None) -> tuple[float, float] | None:
    """Return the ends of the estimate's interval, None where it has none."""
    if estimate is None or estimate.low is None or estimate.high is None:
        return None
    return estimate.low, estimate.high


def batches(grid: Grid) -> tuple[float, ...]:
    """Return the measured batches, for ticks."""
    return tuple(sorted({float(row.cell.batch) for row in grid.rows if row.call_s is not None}))


def _latency_title(grid: Grid) -> str:
    outputs = {setting.output for setting in grid.groups}
    return f"Latency of {next(iter(outputs)):,} new tokens" if len(outputs) == 1 else "Latency of one call"


def _alternative(title: str, x: Axis, y: Axis, panels: Sequence[Panel]) -> str:
    """Say in words what the picture shows: the range of each panel and who is at its ends."""
    parts: list[str] = []
    for panel in panels:
        if panel.spans:
            words = "; ".join(f"{span.label}: {span.note}" for span in panel.spans)
        elif panel.bars:
            words = "; ".join(f"{bar.label}: {bar.note}" for bar in panel.bars)
        else:
            lowest = min(panel.series, key=lambda one: one.points[0].y)
            highest = max(panel.series, key=lambda one: one.points[0].y)
            low, high = (quantities.text(one.points[0].y, y.unit) for one in (lowest, highest))
            batch = lowest.points[0].batch
            words = (
                f"{len(panel.series)} series; at batch {batch} from {low} ({lowest.label}) to {high} ({highest.label})"
            )
        judged = [
            f"{one.label} at batch {one.points[place].batch:,} {verdict}"
            for one in panel.series for place, verdict in one.verdicts if verdict in ("regressed", "improved")
        ]  # fmt: skip
        words = "; ".join([words, *(guide.label for guide in panel.guides if guide.label), *judged[:SERIES_LIMIT]])
        parts.append(f"{panel.title}: {words}" if panel.title else words)
    axes = f"{y.title} against {x.title.lower()}" if y.title else x.title
    return f"{title}. {axes}. {'. '.join(parts)}."
