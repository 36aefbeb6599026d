"""A Report as one HTML file: no request, no font, no script from elsewhere, and names that stay names.

Everything in the file came through jinja2's autoescape or is ours. A content security policy says the same to the
browser: nothing is loaded, and only the one script with our hash runs.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping
from pathlib import Path

import jinja2
from markupsafe import Markup, escape

from bench.report import palette, quantities
from bench.report.figures import vector
from bench.report.figures.pictures import Picture
from bench.report.markdown import MOST_ORIGINS
from bench.report.values import Chart, Column, Report, Table, Value

LARGEST_TABLE = 5000  # rows a browser still sorts at once; the CSV has them all
LONG = 40  # characters from which a table's text may wrap
_FOLDER = Path(__file__).parent / "templates"


def render(report: Report, pictures: Mapping[str, Picture]) -> str:
    """Return the page; `pictures` by chart name."""
    script = (_FOLDER / "report.js").read_text(encoding="utf-8").strip()
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return _environment().get_template("report.html").render(
        report=report,
        pictures={chart.name: _inline(chart, pictures[chart.name]) for chart in report.charts},
        tables=[(table, _columns(table), table.rows[:LARGEST_TABLE]) for table in report.tables],
        most_origins=MOST_ORIGINS,
        policy=f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'",
        style=Markup(stylesheet()),
        script=Markup(script),
    )  # fmt: skip


def stylesheet() -> str:
    """Return the page's CSS with the palette as variables: light, dark where the reader prefers it, light in print."""

    def variables(colours: Mapping[str, str]) -> str:
        return ":root{" + ";".join(f"--{name}:{value}" for name, value in colours.items()) + "}"

    return "\n".join([
        variables(palette.LIGHT),
        f"@media (prefers-color-scheme: dark){{{variables(palette.DARK)}}}",
        f"@media print{{{variables(palette.LIGHT)}}}",
        (_FOLDER / "report.css").read_text(encoding="utf-8"),
    ])  # fmt: skip


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_FOLDER),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["inert"] = quantities.inert
    environment.globals["cell"] = _cell
    return environment


def _inline(chart: Chart, picture: Picture) -> Markup:
    """Both drawings of a chart; the style sheet shows the one that fits the screen."""
    label = str(escape(quantities.inert(chart.alternative)))
    wide = vector.inline(picture.wide, style="wide", label=label)
    return Markup(wide + vector.inline(picture.narrow, style="narrow", label=label))


def _columns(table: Table) -> list[tuple[int, Column]]:
    return [(i, column) for i, column in enumerate(table.columns) if column.key not in table.hidden]


def _cell(value: Value, column: Column) -> Markup:
    """Return the content and sort key of one table cell as attributes and text of a <td>."""
    text = quantities.text(value, column.unit)
    key = value[0] if isinstance(value, tuple) else value
    attributes = Markup("") if key is None or isinstance(key, str) else Markup(' data-key="{}"').format(f"{key:.9g}")
    style = "number" if column.unit != "text" else "long text" if len(text) > LONG else "text"
    if (
        column.key == "outcome"
        or (isinstance(value, str) and column.unit != "text")
        or (column.key == "simulated" and value == "simulated")
    ):
        inner = Markup('<span class="tag {}">{}</span>').format(str(value), text)
    else:
        inner = _name(text) if column.unit == "text" else escape(text)
    return Markup('<td class="{}"{}>{}</td>').format(style, attributes, inner)


def _name(text: str) -> Markup:
    """Return a name that may break after its slashes, apart from the direction of the text around it."""
    return Markup("<bdi>{}</bdi>").format(Markup("/<wbr>").join(text.split("/")))
