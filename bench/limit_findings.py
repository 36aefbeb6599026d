"""Findings on physics: what limited the steps, and how far predictions of times were off. Pure; see `findings`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from bench.report import choices, quantities, wording
from bench.report.summaries import Grid, Summary
from bench.report.values import Finding
from bench.report.wording import Commands

# Two ways to the share of launching are called the same within so much of a step.
AGREE = 0.1

_LIMITS = {
    "launch": "launching",
    "bandwidth": "memory bandwidth",
    "compute": "arithmetic",
    "cache": "the cache's bandwidth",
}


def limits(grid: Grid, commands: Commands) -> list[Finding]:
    """What limited the steps of each runtime, where it can be told, by cells."""
    found: list[Finding] = []
    for setting, groups in choices.first_per_runtime(grid):
        cells = [cell for group in groups.values() for cell in group.measured if cell.limits is not None]
        named = [cell for cell in cells if cell.limits and cell.limits.regime]
        if not named or setting.simulated:
            continue
        counted = Counter(cell.limits.regime for cell in named if cell.limits and cell.limits.regime)
        words = wording.join([f"by {_LIMITS[regime]} in {count:,}" for regime, count in counted.most_common()])
        rest = len(cells) - len(named)
        untold = f"; {rest:,} cannot be told" if rest else ""
        where, count = wording.runtime(setting), wording.plural(len(cells), "cell")
        headline = f"In {where}, the decode step is limited {words} of {count}{untold}."
        again = commands.sweep("--runtime", "compile" if counted["launch"] else setting.runtime, "--out", "again")
        found.append(Finding("limits", headline, _nearest(named), again, "latency-batch"))
    return found


def _nearest(cells: Sequence[Summary]) -> str:
    """The most that any step reached of the roof, and the most that launching took."""
    parts: list[str] = []
    for name, of in (("this machine's ceilings", "measured"), ("the datasheet's peaks", "sheet")):
        roofs = [getattr(cell.limits, of).roof for cell in cells if cell.limits]
        known = [roof for roof in roofs if roof is not None]
        parts += [f"the best reaches {quantities.share(max(known))} of {name}"] if known else []
    shares = [share for cell in cells if cell.limits for share in (cell.limits.launch_share,) if share is not None]
    parts += [f"launching takes up to {quantities.share(max(shares))} of a step"] if shares else []
    checked = [
        (cell.limits.launch_share, cell.limits.idle_share)
        for cell in cells
        if cell.limits and cell.limits.launch_share is not None and cell.limits.idle_share is not None
    ]
    if checked:
        pair, idle = max(checked, key=lambda one: abs(one[0] - one[1]))
        agree = "agrees" if abs(pair - idle) <= AGREE else "does not agree"
        parts.append(
            f"the profiler {agree}: where a graph saves {quantities.share(pair)}, the device idles "
            f"{quantities.share(idle)} of the step"
        )
    least = [share for cell in cells if cell.limits for share in (cell.limits.dispatch_share,) if share is not None]
    parts += [f"dispatching operations takes at least {quantities.share(max(least))} of a step"] if least else []
    text = "; ".join(parts)
    return f"{text[:1].upper()}{text[1:]}." if text else ""


def predictions(grid: Grid, commands: Commands) -> list[Finding]:
    """How far predictions were from this run, and how far those by factors fitted to other cells of it are."""
    for one in grid.predictions:
        if one.shipped is None or one.fitted is None:
            continue
        shipped, fitted, worst = (
            quantities.ratio(value) for value in (one.shipped.typical, one.fitted.typical, one.fitted.worst)
        )
        headline = (
            f"Latency in {one.runtime} {one.dtype} was predicted within {shipped} for half of the cells; factors "
            f"fitted to other cells of this run predict it within {fitted}, {worst} at worst."
        )
        again = commands.sweep("--dry-run", "--calibrated-by", commands.run)
        return [Finding("prediction", headline, "", again)]
    return []
