"""A comparison as GitHub's workflow commands, which it shows as annotations beside a run and its pull request. Pure."""

from __future__ import annotations

from bench import comparison_text
from bench.comparison import Comparison
from bench.report.quantities import inert

MOST = 10  # of each level: GitHub shows no more of one step
TITLE = "shortllama compare"


def commands(comparison: Comparison) -> str:
    """Return one command a line: regressions that gate as errors, worst first, what could not be told as warnings."""
    regressed = comparison.having("regressed")
    gating = [change for change in regressed if change.gates]
    rows = [("error", f"{change.metric} regressed", comparison_text.line(change)) for change in gating[:MOST]]
    warnings: list[str] = []
    if len(gating) > MOST:
        warnings.append(f"{len(gating) - MOST} more regressions; the Markdown table and --json have all")
    if comparison.differing:
        warnings.append("times were not compared, the environments differ: " + "; ".join(comparison.differing))
    warnings += [f"not gated: {comparison_text.line(change)}" for change in regressed if not change.gates]
    warnings += comparison.notes
    rows += [("warning", TITLE, text) for text in warnings[:MOST]]
    rows.append(("notice", TITLE, comparison_text.headline(comparison)))
    return "".join(f"::{level} title={title}::{_data(text)}\n" for level, title, text in rows)


def _data(text: str) -> str:
    return inert(text).replace("%", "%25")
