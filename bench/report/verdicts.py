"""What the gate says of two runs of a report: marks for its figures, a table of every change, a finding. Pure.

Two runs are judged against each other where they are the sides of one experiment (`ab`), or where they are the only two
runs on one fingerprint and ran the same cells. The verdicts are those of `compare`, by the same code. Where code or
date is what differs, the two runs keep apart in every figure; sides that are two subjects stand in one panel anyway.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from itertools import combinations

import msgspec

from bench import comparison, experiment
from bench.cells import Cell
from bench.comparison import Change, Comparison
from bench.measurement import Measurement
from bench.metrics import LATENCY
from bench.report import quantities, wording
from bench.report.sources import combine
from bench.report.summaries import Grid, Setting
from bench.report.values import Column, Finding, Source, Table, Value
from bench.store import Results

ORDER = ("regressed", "improved", "inconclusive", "incomparable", "equivalent")


class Judged(msgspec.Struct, frozen=True):
    """Two runs by their places in the report, base first, with a name each. `by_subject`: the sides are subjects."""

    base: int
    head: int
    names: tuple[str, str]
    by_subject: bool
    found: Comparison


def judged(results: Sequence[Results]) -> tuple[Judged, ...]:
    """Return the pairs of runs that belong together; a run is in one at most."""
    taken: set[int] = set()
    made: list[Judged] = []
    for belong in (_experiment, _alike):
        for one, other in combinations(range(len(results)), 2):
            if not taken & {one, other} and belong(results, one, other):
                taken |= {one, other}
                made.append(_judge(results, one, other))
    return tuple(made)


def _experiment(results: Sequence[Results], one: int, other: int) -> bool:
    return experiment.common(results[one], results[other]) is not None


def _alike(results: Sequence[Results], one: int, other: int) -> bool:
    """Whether these two are the only runs on a fingerprint, and half of the smaller one's cells are the other's, too:
    a sweep and a search for the end of memory are two views of one state, not two states."""
    for key in results[one].environments.keys() & results[other].environments.keys():
        if sum(key in run.environments for run in results) == 2:
            cells = [{m.cell for m in results[place].measurements if m.environment == key} for place in (one, other)]
            if 2 * len(cells[0] & cells[1]) >= max(1, min(map(len, cells))):
                return True
    return False


def _judge(results: Sequence[Results], one: int, other: int) -> Judged:
    design = experiment.common(results[one], results[other])
    sides = [results[place].path.parent.name for place in (one, other)]
    dates = [_date(results[place]) for place in (one, other)]
    swapped = sides == [*reversed(experiment.SIDES)] if design else dates[0] > dates[1]
    base, head = (other, one) if swapped else (one, other)
    days = tuple(_date(results[place])[:10] for place in (base, head))
    named = tuple(quantities.inert(results[place].path.parent.name) for place in (base, head))
    names = experiment.SIDES if design else days if len(set(days)) == 2 else named
    names = (names[0], names[1]) if len(set(names)) == 2 else ("first", "second")
    by_subject = design is not None and design.by_subject
    return Judged(base, head, names, by_subject, comparison.compare(results[base], results[head]))


def _date(run: Results) -> str:
    return min((str(one.facts.get("date", "")) for one in run.environments.values()), default="")


# -- what keeps two runs apart -----------------------------------------------------------------------------------------


def keys(found: Sequence[Judged], results: Sequence[Results]) -> list[dict[str, str]]:
    """Return, for each run, the key that each of its environments has in the report: its id, and for the head of a
    pair that shares it with the base, one of its own."""
    made = [{key: key for key in run.environments} for run in results]
    for one in found:
        if not one.by_subject:
            shared = made[one.base].keys() & made[one.head].keys()
            made[one.head].update({key: f"{key} {one.names[1]}" for key in shared})
    return made


def side(found: Sequence[Judged], place: int) -> str:
    """Return what tells a run from the one that it is judged against, "" for any other run."""
    for one in found:
        if not one.by_subject and place in (one.base, one.head):
            return one.names[0] if place == one.base else one.names[1]
    return ""


def named(source: Source, words: str) -> Source:
    """Return a source with its side."""
    return msgspec.structs.replace(source, side=words)


Place = tuple[Setting, str, int]


def marks(
    found: Sequence[Judged], results: Sequence[Results], setting_of: Callable[[int, Measurement], Setting]
) -> dict[Place, str]:
    """Return the verdict on the latency of each cell of a head, by setting, subject and batch."""
    made: dict[Place, str] = {}
    for one in found:
        verdict = {c.cell_id: c.decision.verdict for c in one.found.changes if c.metric == LATENCY.name}
        of_base = {_alone(row.cell): row.cell_id for row in results[one.base].measurements}
        for row in results[one.head].measurements:
            key = of_base.get(_alone(row.cell)) if one.by_subject else row.cell_id
            if key in verdict:
                made[setting_of(one.head, row), row.cell.subject, row.cell.batch] = verdict[key]
    return made


def _alone(cell: Cell) -> Cell:
    return msgspec.structs.replace(cell, subject="")


# -- what a report shows -----------------------------------------------------------------------------------------------


def tables(found: Sequence[Judged], grid: Grid) -> tuple[Table, ...]:
    """Return the table of changes, worst first, and that of pooled ratios; nothing without a pair."""
    if not found:
        return ()
    source = combine(list(grid.sources.values()), simulated=any(setting.simulated for setting in grid.groups))
    several = len(found) > 1
    changes = tuple(
        row for one in found for verdict in ORDER for change in one.found.having(verdict) for row in [_row(one, change)]
    )
    hidden = frozenset({"base_value", "head_value", *(() if several else ("between",))})
    constant = "" if several else _between(found[0])
    caption = (
        "The verdicts of `shortllama compare`, by the same rules. Detectable is the least worsening that would have "
        "been found; a verdict of inconclusive says no more than that it was not."
    )
    tables = [Table("verdicts", "Verdicts", _COLUMNS, changes, source, constant, hidden, caption)]
    pooled = tuple(row for one in found for row in _pooled(one))
    if pooled:
        caption = (
            "The geometric mean of a subject's ratios over its cells; judged pair by pair where sessions are paired."
        )
        hidden = frozenset(() if several else ("between",))
        tables.append(
            Table("verdicts-pooled", "Verdicts over all cells", _POOLED, pooled, source, constant, hidden, caption)
        )
    return tuple(tables)


_COLUMNS = (
    Column("cell", "Cell"), Column("between", "Between"), Column("metric", "Metric"), Column("verdict", "Verdict"),
    Column("base", "Base"), Column("head", "Head"), Column("base_value", "Base"), Column("head_value", "Head"),
    Column("ratio", "Head over base", "change"),
    Column("ratio_interval", "95 % interval", "change", interval=True),
    Column("detectable", "Detectable", "accuracy"), Column("pairs", "Pairs", "integer"), Column("reason", "Why"),
)  # fmt: skip
_POOLED = (
    Column("subject", "Subject"), Column("between", "Between"), Column("metric", "Metric"),
    Column("verdict", "Verdict"), Column("ratio", "Head over base", "change"),
    Column("ratio_interval", "95 % interval", "change", interval=True), Column("cells", "Cells", "integer"),
    Column("pairs", "Pairs", "integer"),
)  # fmt: skip


def _between(one: Judged) -> str:
    """What the sides are: as the experiment says, else by what tells them apart."""
    plain = f"base: {one.names[0]} · head: {one.names[1]}"
    return " · ".join(one.found.notes) or plain


def _row(one: Judged, change: Change) -> tuple[Value, ...]:
    judge = change.decision
    ends = None if judge.low is None or judge.high is None else (judge.low, judge.high)
    return (
        change.cell, _between(one), change.metric, judge.verdict,
        quantities.text(judge.base, change.unit), quantities.text(judge.head, change.unit), judge.base, judge.head,
        judge.ratio, ends, judge.detectable, judge.pairs or None, judge.reason,
    )  # fmt: skip


def _pooled(one: Judged) -> list[tuple[Value, ...]]:
    rows: list[tuple[Value, ...]] = []
    for each in one.found.pooled:
        judge = each.decision
        ends = None if judge is None or judge.low is None or judge.high is None else (judge.low, judge.high)
        verdict, pairs = (None, None) if judge is None else (judge.verdict, judge.pairs)
        if each.cells > 1:
            rows.append((each.subject, _between(one), each.metric, verdict, each.ratio, ends, each.cells, pairs))
    return rows


def findings(found: Sequence[Judged], runs: Sequence[str]) -> tuple[Finding, ...]:
    """Return one finding a pair: how many changes got which verdict, the worst of them, and how to see them all.

    `runs`: the names of all runs, for the command.
    """
    return tuple(_finding(one, (runs[one.base], runs[one.head])) for one in found)


def _finding(one: Judged, runs: tuple[str, str]) -> Finding:
    compared = one.found
    counts = {verdict: len(compared.having(verdict)) for verdict in ORDER}
    said = wording.join([f"{count} {verdict}" for verdict, count in counts.items() if count])
    cells = wording.plural(compared.cells, "cell")
    headline = f"From {one.names[0]} to {one.names[1]}, {len(compared.changes):,} values of {cells}: {said}."
    worst = next((change for verdict in ORDER[:2] for change in compared.having(verdict)), None)
    causes = [f"{'Worst' if worst.decision.worse > 0 else 'Best'}: {_told(worst)}."] if worst else []
    least = [c.decision.detectable for c in compared.changes if c.metric == LATENCY.name and c.decision.detectable]
    if least:
        causes.append(f"A latency worse by {max(least):.1%} would have been found in any cell.")
    causes += [f"{note[:1].upper()}{note[1:]}." for note in compared.notes]
    command = shlex.join(["shortllama", "compare", *runs])
    return Finding("verdict", headline, " ".join(causes), command, figure="latency-batch")


def _told(change: Change) -> str:
    judge = change.decision
    ratio = "" if judge.ratio is None else f", {quantities.ratio(judge.ratio)} of base"
    values = f"{quantities.text(judge.base, change.unit)} became {quantities.text(judge.head, change.unit)}"
    return f"{change.metric} of {quantities.shorten(change.cell, 60)}, {values}{ratio}"
