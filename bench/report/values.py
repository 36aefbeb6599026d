"""The report as data: tables, charts and text, before anything is drawn. Plain values in SI units; no renderer here.

A renderer takes a Report and nothing else; a chart takes no decision from its renderer but where its pixels go. Golden
tests look at these values, never at pixels.
"""

from __future__ import annotations

from typing import Literal, TypeAlias

import msgspec

Value: TypeAlias = str | float | int | tuple[float, float] | None  # a pair is an interval


class Source(msgspec.Struct, frozen=True):
    """Where numbers come from: one environment of one run. Goes under every figure and table.

    `side` tells two runs of one fingerprint apart that are judged against each other.
    """

    environment: str
    device: str
    versions: str
    date: str
    run: str = ""
    suite: str = ""
    command: str = ""
    commit: str = ""
    facts: tuple[tuple[str, str], ...] = ()
    side: str = ""

    @property
    def place(self) -> str:
        """Device and side."""
        return " · ".join(part for part in (self.device, self.side) if part)

    @property
    def made(self) -> str:
        """Run, suite and commit in one line."""
        suite = f"suite {self.suite}" if self.suite else ""
        return " · ".join(part for part in (self.run, suite, f"commit {self.commit}" if self.commit else "") if part)

    @property
    def line(self) -> str:
        """Device, side, versions and date in one line."""
        return " · ".join(part for part in (self.place, self.versions, self.date) if part)


class Column(msgspec.Struct, frozen=True):
    """One column. `key` names it in CSV, with its unit; `unit` is a key of quantities.FORMATS or "text".

    `interval` columns hold pairs and become two columns of a CSV.
    """

    key: str
    title: str
    unit: str = "text"
    interval: bool = False


class Table(msgspec.Struct, frozen=True):
    """Rows of raw values. `hidden`: keys of columns that only the CSV holds; `constant`: what is equal in all rows."""

    name: str
    title: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[Value, ...], ...]
    source: str
    constant: str = ""
    hidden: frozenset[str] = frozenset()
    caption: str = ""


class Axis(msgspec.Struct, frozen=True):
    """`unit` is a key of quantities.FORMATS; `values` are the only places where ticks make sense, empty = anywhere.

    Axes are logarithmic; a `linear` one begins at zero.
    """

    title: str
    unit: str
    values: tuple[float, ...] = ()
    linear: bool = False


class Point(msgspec.Struct, frozen=True):
    """One mark. `x_interval` and `y_interval` are 95 % intervals, None where there is none."""

    x: float
    y: float
    batch: int
    x_interval: tuple[float, float] | None = None
    y_interval: tuple[float, float] | None = None


class Series(msgspec.Struct, frozen=True):
    """One subject in one runtime, batch ascending. `oom`: the batch at which memory ended, None if it never did.

    `colour` and `label` name the subject in every figure alike; `runtime` picks the marker ("" where nothing ran).
    `changes`: the points, by index, that a ring marks: where a history reaches a new level, blocks that were removed.
    """

    subject: str
    label: str
    colour: str
    runtime: str
    simulated: bool
    points: tuple[Point, ...]
    oom: int | None = None
    changes: tuple[int, ...] = ()
    verdicts: tuple[tuple[int, str], ...] = ()


class Span(msgspec.Struct, frozen=True):
    """Where memory ends for one subject: the largest batch that fits and the smallest that does not, None if unseen."""

    subject: str
    label: str
    colour: str
    runtime: str
    simulated: bool
    fits: int | None
    fails: int | None
    note: str


class Guide(msgspec.Struct, frozen=True):
    """A line that was not measured but helps to read what was: a fit, a roof. `label` stands over the plot."""

    label: str
    points: tuple[tuple[float, float], ...]


class Part(msgspec.Struct, frozen=True):
    """One stretch of a bar. Parts of one `label` have one colour in all bars."""

    label: str
    colour: str
    value: float


class Bar(msgspec.Struct, frozen=True):
    """What one subject's total is made of; the parts add up to it. `note` says the total."""

    subject: str
    label: str
    runtime: str
    simulated: bool
    parts: tuple[Part, ...]
    note: str


class Panel(msgspec.Struct, frozen=True):
    """One pair of axes; `title` says how it differs from its neighbours."""

    title: str
    series: tuple[Series, ...] = ()
    spans: tuple[Span, ...] = ()
    bars: tuple[Bar, ...] = ()
    guides: tuple[Guide, ...] = ()


class Chart(msgspec.Struct, frozen=True):
    """One figure. `form` picks the drawing; `reading` tells how to read it; `alternative` replaces it for the blind.

    `diagonals`: points of equal batch lie on one line of slope -1 (throughput x latency = tokens), drawn and labelled.
    `ring`: what the rings of `Series.changes` say; `origins`: the sources of what is drawn, none: all of the report's.
    """

    name: str
    title: str
    form: Literal["lines", "points", "spans", "bars"]
    x: Axis
    y: Axis
    panels: tuple[Panel, ...]
    source: str
    reading: str
    alternative: str
    simulated: bool = False
    diagonals: bool = False
    left_out: str = ""
    constant: str = ""
    ring: str = "a new level"
    origins: tuple[Source, ...] = ()


class Finding(msgspec.Struct, frozen=True):
    """One thing worth knowing: a sentence with its number, why it is so, and the command to run next.

    `figure` names the chart that shows it; `brief` is its share of the verdict, empty for none.
    """

    kind: str
    headline: str
    cause: str = ""
    command: str = ""
    figure: str = ""
    brief: str = ""


class Report(msgspec.Struct, frozen=True):
    """Everything a renderer needs. `notes` are cautions that hold for all of it (simulated rows, mixed sources)."""

    title: str
    source: str
    verdict: str
    findings: tuple[Finding, ...]
    notes: tuple[str, ...]
    charts: tuple[Chart, ...]
    tables: tuple[Table, ...]
    sources: tuple[Source, ...]
