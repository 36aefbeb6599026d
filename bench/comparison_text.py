"""A comparison as text: for a terminal, and as a Markdown table fit for a comment on a pull request. Pure strings."""

from __future__ import annotations

from bench.comparison import Change, Comparison, Pooled
from bench.report.quantities import text

SHOWN = ("regressed", "improved", "inconclusive", "incomparable")
MOST_ROWS = 40  # a comment has a size limit, and nobody reads more


def headline(comparison: Comparison) -> str:
    """Return the whole comparison in one line: cells, and how many changes got which verdict."""
    counts = [f"{len(comparison.having(verdict))} {verdict}" for verdict in (*SHOWN, "equivalent")]
    alone = [
        f"{count} only in {side}"
        for count, side in ((comparison.base_only, "base"), (comparison.head_only, "head"))
        if count
    ]
    simulated = [f"{comparison.simulated} simulated"] if comparison.simulated else []
    return f"{comparison.cells} cells: {', '.join(counts)}" + "".join(f"; {one}" for one in (*simulated, *alone))


def terminal(comparison: Comparison) -> str:
    """Return the summary for a terminal, worst changes first."""
    lines = [headline(comparison)]
    lines += [f"note: {note}" for note in comparison.notes]
    lines += [f"environments differ: {field}" for field in comparison.differing]
    lines += [
        f"{change.decision.verdict:12}  {change.metric:15}  {change.cell}: {_values(change)}{_why(change)}"
        for change in shown(comparison)
    ]
    hidden = _hidden(comparison)
    if hidden:
        lines.append(f"... and {hidden} more (--json has all)")
    lines += [
        f"{one.subject}: {one.metric} {one.ratio:.4f} of base over {one.cells} cells{_judged(one, ' ({})')}"
        for one in _pooled(comparison)
    ]
    return "\n".join(lines) + "\n"


def line(change: Change) -> str:
    """Return one change without its verdict: metric, cell, values, effect, reason, least detectable effect."""
    return f"{change.metric} of {change.cell}: {_values(change)}{_why(change)}"


def markdown(comparison: Comparison) -> str:
    """Return a Markdown document: the headline, what differs, and the changes, worst first."""
    lines = [f"**{headline(comparison)}**", ""]
    if comparison.notes:
        lines += [*(f"- {_escaped(note)}" for note in comparison.notes), ""]
    if comparison.differing:
        lines += ["Times were not compared, the environments differ:", ""]
        lines += [f"- {_escaped(field)}" for field in comparison.differing] + [""]
    rows = shown(comparison)
    if rows:
        lines += ["| verdict | cell | metric | base | head | head / base | detectable | why |", "|" + "---|" * 8]
        lines += [_row(change) for change in rows]
    hidden = _hidden(comparison)
    if hidden:
        lines += ["", f"... and {hidden} more."]
    if _pooled(comparison):
        lines += ["", "| subject | metric | geometric mean of head / base | cells | verdict |", "|" + "---|" * 5]
        lines += [
            f"| {_escaped(one.subject)} | {one.metric} | {one.ratio:.4f} | {one.cells} | {_judged(one, '{}')} |"
            for one in _pooled(comparison)
        ]
    return "\n".join(lines) + "\n"


def shown(comparison: Comparison) -> list[Change]:
    """Return the changes worth a line, worst first, at most MOST_ROWS."""
    return [change for verdict in SHOWN for change in comparison.having(verdict)][:MOST_ROWS]


def _hidden(comparison: Comparison) -> int:
    return sum(len(comparison.having(verdict)) for verdict in SHOWN) - len(shown(comparison))


def _values(change: Change) -> str:
    decision = change.decision
    return f"{text(decision.base, change.unit)} -> {text(decision.head, change.unit)}{_ratio(change, ' (x {})')}"


def _ratio(change: Change, form: str) -> str:
    decision = change.decision
    if decision.ratio is None:
        return ""
    ends = "" if decision.low is None or decision.high is None else f", {decision.low:.3f} to {decision.high:.3f}"
    return form.format(f"{decision.ratio:.3f}{ends}")


def _pooled(comparison: Comparison) -> list[Pooled]:
    """The pooled ratios that say more than the line of their only cell."""
    return [one for one in comparison.pooled if one.cells > 1]


def _judged(one: Pooled, form: str) -> str:
    decision = one.decision
    if decision is None:
        return ""
    return form.format(f"{decision.low:.4f} to {decision.high:.4f} in {decision.pairs} pairs: {decision.verdict}")


def _why(change: Change) -> str:
    decision = change.decision
    least = "" if decision.detectable is None else f"; detectable from {decision.detectable:.1%}"
    return (f"; {decision.reason}" if decision.reason else "") + least


def _row(change: Change) -> str:
    decision = change.decision
    least = "" if decision.detectable is None else f"{decision.detectable:.1%}"
    cells = (
        decision.verdict,
        change.cell,
        change.metric,
        text(decision.base, change.unit),
        text(decision.head, change.unit),
        _ratio(change, "{}"),
        least,
        decision.reason or "",
    )
    return "| " + " | ".join(map(_escaped, cells)) + " |"


def _escaped(value: str) -> str:
    return " ".join(value.replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;").split())
