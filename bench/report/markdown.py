"""A Report as Markdown: the same content as the page, with the figures as PNG beside it. Pure."""

from __future__ import annotations

import re
from collections.abc import Sequence

from bench.report import quantities
from bench.report.values import Chart, Column, Finding, Report, Source, Table, Value

LARGEST_TABLE = 1000
MOST_ORIGINS = 4  # under one figure
_SPECIAL = re.compile(r"([\\`*_{}\[\]<>#|$~!&])")


def render(report: Report) -> str:
    """Return the document."""
    parts = [f"# {escape(report.title)}", escape(report.verdict)]
    parts += [f"> {escape(note)}" for note in report.notes]
    if report.findings:
        parts += ["## Findings", "\n".join(_finding(finding) for finding in report.findings)]
    if report.charts:
        parts += ["## Figures", *(_chart(chart) for chart in report.charts)]
    parts += ["## Tables", *(_table(table) for table in report.tables)]
    parts += ["## Provenance", *(_source(source) for source in report.sources)]
    return "\n\n".join(parts) + "\n"


def escape(text: str) -> str:
    """Return text that Markdown shows as it is: no markup, no HTML, one line."""
    return _SPECIAL.sub(r"\\\1", quantities.inert(text))


def code(text: str) -> str:
    """Return inline code, fenced by one more backtick than the text holds."""
    plain = quantities.inert(text)
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", plain)), default=0))
    space = " " if plain.startswith("`") or plain.endswith("`") else ""
    return f"{fence}{space}{plain}{space}{fence}"


def _finding(finding: Finding) -> str:
    lines = [f"- **{escape(finding.headline)}**"]
    if finding.cause:
        lines.append(f"  {escape(finding.cause)}")
    if finding.command:
        lines.append(f"  Next: {code(finding.command)}")
    return "  \n".join(lines)


def _chart(chart: Chart) -> str:
    facts = [chart.constant, chart.source, chart.left_out]
    return "\n\n".join([
        f"### {escape(chart.title)}",
        f"![{escape(chart.alternative)}](figures/{chart.name}.png)",
        escape(chart.reading),
        f"<sub>{' · '.join(escape(fact) for fact in facts if fact)} · "
        f"[SVG](figures/{chart.name}.svg) · [CSV](figures/{chart.name}.csv)</sub>",
        *[f"<sub>{text}</sub>" for text in [_origins(chart.origins)] if text],
    ])  # fmt: skip


def _origins(sources: Sequence[Source]) -> str:
    """Say of what a figure was made, and with which commands it is made again."""
    lines: list[str] = []
    for one in sources[:MOST_ORIGINS]:
        again = f"again with {code(one.command)}" if one.command else ""
        lines.append(" · ".join(part for part in (escape(one.made), again) if part))
    return "; ".join(line for line in lines if line)


def _table(table: Table) -> str:
    shown = [(i, column) for i, column in enumerate(table.columns) if column.key not in table.hidden]
    lines = [_line([escape(column.title) for _, column in shown])]
    lines.append(_line(["---" if column.unit == "text" else "---:" for _, column in shown]))
    lines += [_line(_cells(row, shown)) for row in table.rows[:LARGEST_TABLE]]
    facts = [table.constant, table.source]
    if len(table.rows) > LARGEST_TABLE:
        facts.append(f"the first {LARGEST_TABLE:,} of {len(table.rows):,} rows; the CSV has them all")
    note = " · ".join(escape(fact) for fact in facts if fact)
    parts = [
        f"### {escape(table.title)}",
        "\n".join(lines),
        escape(table.caption),
        f"<sub>{note} · [CSV](tables/{table.name}.csv)</sub>",
    ]
    return "\n\n".join(part for part in parts if part)


def _cells(row: Sequence[Value], shown: Sequence[tuple[int, Column]]) -> list[str]:
    return [escape(quantities.text(row[i], column.unit)) for i, column in shown]


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _source(source: Source) -> str:
    facts = [
        ("Device", escape(source.device)), ("Versions", escape(source.versions)), ("Date", escape(source.date)),
        ("Run", escape(source.run)), ("Suite", escape(source.suite)),
        ("Again with", code(source.command) if source.command else ""), ("Commit", escape(source.commit)),
        ("Fingerprint", code(source.environment) if source.environment else ""),
    ]  # fmt: skip
    return "\n".join(f"- {label}: {text}" for label, text in facts if text)
