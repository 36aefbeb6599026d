"""Tables and charts as CSV: raw values in the units of the column names, for other people's scripts. Pure."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from itertools import chain

from bench.report.quantities import inert
from bench.report.values import Chart, Table, Value

# A spreadsheet runs a text that begins with one of these; a name from a results file must stay a name.
_FORMULA = ("=", "+", "-", "@", "\t", "\r")


def table(value: Table) -> str:
    """Return every column of the table, hidden ones too; an interval is two columns, `low` and `high`."""
    header: list[str] = []
    for column in value.columns:
        header += [f"{column.key}_low", f"{column.key}_high"] if column.interval else [column.key]
    return _csv(header, (_row(value, row) for row in value.rows))


def _row(value: Table, row: Sequence[Value]) -> list[Value]:
    cells: list[Value] = []
    for column, cell in zip(value.columns, row, strict=True):
        if column.interval:
            cells += list(cell) if isinstance(cell, tuple) else [None, None]
        else:
            cells.append(cell)
    return cells


def chart(value: Chart) -> str:
    """Return what is drawn, one mark a row; spans have the batches that fit and that do not.

    Guides follow the marks, under their labels.
    """
    if value.form == "spans":
        return _csv(
            ["panel", "subject", "runtime", "simulated", "largest_batch_that_fits", "smallest_that_runs_out"],
            (
                [panel.title, one.subject, one.runtime, _flag(one.simulated), one.fits, one.fails]
                for panel in value.panels for one in panel.spans
            ),
        )  # fmt: skip
    if value.form == "bars":
        return _csv(
            ["panel", "subject", "runtime", "simulated", "part", "value"],
            (
                [panel.title, one.subject, one.runtime, _flag(one.simulated), part.label, part.value]
                for panel in value.panels for one in panel.bars for part in one.parts
            ),
        )  # fmt: skip
    header = [
        "panel",
        "subject",
        "runtime",
        "simulated",
        "batch",
        "x",
        "y",
        "x_low",
        "x_high",
        "y_low",
        "y_high",
        "oom",
    ]
    none = (None, None)
    judged = any(one.verdicts for panel in value.panels for one in panel.series)
    guides = (
        [panel.title, guide.label, "", "guide", None, x, y, *none, *none, None, value.x.title, value.y.title]
        for panel in value.panels for guide in panel.guides for x, y in guide.points
    )  # fmt: skip
    return _csv(
        [*header, "x_meaning", "y_meaning", *(["verdict"] if judged else [])],
        chain((
            [panel.title, one.subject, one.runtime, _flag(one.simulated), point.batch, point.x, point.y,
             *(point.x_interval or none), *(point.y_interval or none), one.oom, value.x.title, value.y.title,
             *([dict(one.verdicts).get(place)] if judged else [])]
            for panel in value.panels for one in panel.series for place, point in enumerate(one.points)
        ), guides),
    )  # fmt: skip


def _flag(value: bool) -> str:
    return "simulated" if value else "measured"


def _csv(header: Sequence[str], rows: Iterable[Sequence[Value]]) -> str:
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow([_safe(name) for name in header])
    for row in rows:
        writer.writerow([_safe(cell) if isinstance(cell, str) else cell for cell in row])
    return buffer.getvalue()


def _safe(text: str) -> str:
    plain = inert(text)
    return f"'{plain}" if plain.startswith(_FORMULA) else plain
