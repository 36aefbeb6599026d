"""Results into figures, tables and pages: `build` makes the data, `write` a folder of HTML, Markdown, CSV and figures.

Imports happen inside: bench.findings reads this package's values, and no command but `report` should pay for drawing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bench.report.sources import Origin
    from bench.report.values import Report
    from bench.store import Results
    from shortllama.evaluation.results import Quality


def build(
    results: Sequence[Results], quality: Mapping[str, Quality] | None = None, origins: Sequence[Origin] = ()
) -> Report:
    """Return the report on these runs as data; see bench.report.assembly."""
    from bench.report import assembly

    return assembly.build(results, quality, origins)


def write(runs: Sequence[Path], out: Path) -> Report:
    """Write the report on these runs into the folder `out`; see bench.report.publish. Raises InputError."""
    from bench.report import publish

    return publish.write(runs, out)


def read(runs: Sequence[Path]) -> Report:
    """Return the report on these runs as data, and write nothing. Raises InputError."""
    from bench.report import publish

    return publish.gather(runs)[0]


def show(report: Report) -> None:
    """Write a report to the terminal; see bench.report.terminal."""
    from bench.report import terminal

    terminal.show(report)
