"""The report in a terminal: verdict, findings, a sparkline for each curve and the tables. The only use of rich here."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.console import Console, Group, RenderableType
from rich.table import Table as Grid
from rich.text import Text

from bench.report import quantities
from bench.report.values import Bar, Chart, Column, Report, Series, Span, Table

STEPS = "▁▂▃▄▅▆▇█"
LARGEST_TABLE = 40
WIDEST_SPARK = 24
LONGEST_NAME = 30  # cells of the first column
GAP = 3  # cells between columns


def render(report: Report, width: int) -> RenderableType:
    """Return the whole report for a terminal of `width` cells. Names are text, never markup."""
    parts: list[RenderableType] = [_line(report.title, "bold"), _line(report.source, "dim")]
    if report.verdict:
        parts += ["", _line(report.verdict)]
    for finding in report.findings:
        parts += ["", Text.assemble("• ", (quantities.inert(finding.headline), "bold"))]
        parts += [_line(f"  {finding.cause}")] if finding.cause else []
        parts += [Text.assemble("  Next: ", (quantities.inert(finding.command), "cyan"))] if finding.command else []
    parts += [part for note in report.notes for part in ("", _line(note, "yellow"))]
    for chart in report.charts:
        parts += ["", _chart(chart)]
    for table in report.tables:
        parts += ["", _table(table, width)]
    return Group(*parts)


def show(report: Report) -> None:
    """Write the report to stdout as wide as the terminal; plain text where stdout is none."""
    console = Console(highlight=False)
    console.print(render(report, console.width))


def sparkline(values: Sequence[float]) -> str:
    """Return one block a value, from the lowest to the highest of them; all alike stand in the middle."""
    low, high = min(values), max(values)
    top = len(STEPS) - 1
    return "".join(STEPS[round((v - low) / (high - low) * top) if high > low else top // 2] for v in values)


def _line(text: str, style: str = "") -> Text:
    return Text(quantities.inert(text), style)


def _grid(title: str, caption: str) -> Grid:
    return Grid(
        title=_line(title, "bold"), caption=_line(caption, "dim"), title_justify="left", caption_justify="left",
        box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False,
    )  # fmt: skip


def _chart(chart: Chart) -> Grid:
    """One row a curve: where it begins and ends, and its way between as a sparkline."""
    axes = f"{chart.y.title} against {chart.x.title.lower()}" if chart.form == "lines" else ""
    grid = _grid(chart.title, " · ".join(part for part in (axes, chart.constant, chart.left_out) if part))
    several = len(chart.panels) > 1 or any(panel.title for panel in chart.panels)
    headings = _headings(chart)
    grid.add_column("Panel" if several else "Subject")
    if several:
        grid.add_column("Subject")
    for heading in headings:
        grid.add_column(heading, justify="right" if heading else "left")
    for panel in chart.panels:
        members = (*panel.series, *panel.spans, *panel.bars)
        mixed = len({one.runtime for one in members}) > 1
        first = [_line(panel.title)] if several else []
        for one in members:
            label = f"{one.label} ({one.runtime})" if mixed else one.label
            grid.add_row(*first, _line(label), *(_line(text) for text in _cells(chart, one)))
        for guide in panel.guides:
            if guide.label:
                grid.add_row(*first, _line(guide.label, "italic"))
    return grid


def _headings(chart: Chart) -> tuple[str, ...]:
    if chart.form == "lines":
        return ("First", "", "Last")
    if chart.form == "points":
        return (chart.x.title, chart.y.title)
    parts = [part.label for panel in chart.panels for bar in panel.bars for part in bar.parts]
    return (chart.x.title, *dict.fromkeys(parts))


def _cells(chart: Chart, one: Series | Span | Bar) -> tuple[str, ...]:
    if not isinstance(one, Series):
        parts = one.parts if isinstance(one, Bar) else ()
        return (one.note, *(quantities.text(part.value, chart.x.unit) for part in parts))
    ys = [quantities.text(point.y, chart.y.unit) for point in one.points]
    if chart.form == "lines":
        apart = -(-len(one.points) // WIDEST_SPARK)
        return ys[0], sparkline([point.y for point in one.points][::apart]), ys[-1]
    if len(ys) > 1:  # a cloud of marks has no order
        return quantities.DASH, f"{len(ys)} cells"
    return quantities.text(one.points[0].x, chart.x.unit), ys[0]


def _table(table: Table, width: int) -> Grid:
    """The first columns and rows that fit; the rest is counted below, and is in the report's folder."""
    shown = [(i, column) for i, column in enumerate(table.columns) if column.key not in table.hidden]
    rows = table.rows[:LARGEST_TABLE]
    texts = {i: [quantities.text(row[i], column.unit) for row in rows] for i, column in shown}
    shown = [(i, c) for i, c in shown if any(text != quantities.MISSING for text in texts[i])] or shown[:1]
    kept: list[tuple[int, Column]] = []
    room = width
    for i, column in shown:
        need = max(map(len, (*texts[i], column.title)), default=0) + GAP
        need = min(need, LONGEST_NAME + GAP) if not kept else need
        if not kept or need <= room:
            kept.append((i, column))
            room -= need
    left = [f"{len(table.rows) - len(rows):,} more rows"] if len(table.rows) > len(rows) else []
    left += [f"{len(shown) - len(kept)} columns left out, --out has them"] if len(shown) > len(kept) else []
    grid = _grid(table.title, " · ".join(part for part in (table.constant, *left) if part))
    for i, column in kept:
        text = column.unit == "text"
        grid.add_column(
            _line(column.title),
            justify="left" if text else "right",
            overflow="fold" if not i else "ellipsis",
            no_wrap=bool(i),
        )
    for place in range(len(rows)):
        grid.add_row(*(_line(texts[i][place]) for i, _ in kept))
    return grid
