"""The history of each cell over the runs of a report: a figure, a table, and findings on changes of level. Pure.

A run is one results file; its rows are one value a cell, the median over its sessions. Histories are told apart by all
that keeps times from being compared (environment, timing), so that a new library begins a new one. What a change is,
and what noise, is decided in `bench.trend`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from statistics import median

import msgspec

from bench import noise, trend
from bench.cells import Cell
from bench.measurement import Environment
from bench.report import quantities, settings, wording
from bench.report.palette import colours
from bench.report.series import PANEL_LIMIT, SERIES_LIMIT
from bench.report.sources import combine
from bench.report.summaries import Grid, Setting, Summary, summarise
from bench.report.values import Axis, Chart, Column, Finding, Panel, Point, Series, Table
from bench.store import Results
from bench.trend import Change
from bench.verdicts import FLOOR, ROUNDING

_MOST_FINDINGS = 4
_MOST_TICKS = 8


class Seen(msgspec.Struct, frozen=True):
    """A cell in one run: the run's place among all (0 is the oldest), its date and commit, and seconds a call."""

    run: int
    date: str
    commit: str
    call_s: float


class History(msgspec.Struct, frozen=True):
    """A cell under one setting, runs in order, in at least `trend.LEAST_RUNS` of them."""

    cell: Cell
    setting: Setting
    seen: tuple[Seen, ...]
    changes: tuple[Change, ...]


def histories(results: Sequence[Results]) -> tuple[History, ...]:
    """Return the histories in runs; they are put in order by the dates of their environments, then as given."""
    if len(results) < trend.LEAST_RUNS:
        return ()
    found: dict[tuple[Setting, Cell], list[Seen]] = {}
    stored: dict[str, float] = {}
    for place, run in enumerate(sorted(results, key=_date)):
        sessions: dict[tuple[Setting, Cell], list[Summary]] = {}
        for row in map(summarise, run.measurements):
            if row.counts:
                sessions.setdefault((row.setting, row.cell), []).append(row)
        for (setting, cell), rows in sessions.items():
            facts = run.environments[setting.environment].facts
            call_s = median(row.call_s.value for row in rows if row.call_s)
            one = Seen(place, str(facts.get("date", ""))[:10], str(facts.get("commit") or ""), call_s)
            found.setdefault((setting, cell), []).append(one)
            if noise.BETWEEN_FACT in facts:
                stored[setting.environment] = float(facts[noise.BETWEEN_FACT])
    long = {key: seen for key, seen in found.items() if len(seen) >= trend.LEAST_RUNS}
    return tuple(_judged(long, stored))


def _date(run: Results) -> str:
    dates = (_when(environment) for environment in run.environments.values())
    return min(dates, default="")


def _when(environment: Environment) -> str:
    return str(environment.facts.get("date", ""))


def _judged(long: Mapping[tuple[Setting, Cell], list[Seen]], stored: Mapping[str, float]) -> list[History]:
    """Find the changes; the noise of an environment is that of all its histories together."""
    values = {key: [one.call_s for one in seen] for key, seen in long.items()}
    loud = {
        name: trend.noise_of((values[key] for key in long if key[0].environment == name), stored.get(name))
        for name in dict.fromkeys(setting.environment for setting, _ in long)
    }
    judged: list[History] = []
    for (setting, cell), seen in long.items():
        sigma, floor = (ROUNDING, ROUNDING) if setting.simulated else (loud[setting.environment], FLOOR)
        marks = trend.changes(values[setting, cell], sigma, len(long), floor)
        judged.append(History(cell, setting, tuple(seen), marks))
    return judged


# -- what a report shows -----------------------------------------------------------------------------------------------


def charts(found: Sequence[History], grid: Grid) -> tuple[Chart, ...]:
    """Return the figure, if there is anything to draw: a panel for each setting and batch, those with changes first."""
    if not found:
        return ()
    panels: dict[tuple[Setting, int], list[History]] = {}
    for one in sorted(found, key=lambda one: not one.changes):
        panels.setdefault((one.setting, one.cell.batch), []).append(one)
    titles, constant = settings.split([setting for setting, _ in panels], grid.sources)
    batches = {batch for _, batch in panels}
    names = colours([(s, s in grid.dense) for s in grid.subjects])
    drawn = [
        Panel(
            " · ".join([titles[setting], *([f"batch {batch}"] if len(batches) > 1 else [])]),
            tuple(_series(one, grid, names) for one in _in_order(members, grid)[:SERIES_LIMIT]),
        )
        for (setting, batch), members in panels.items()
    ]
    runs = max(one.seen[-1].run for one in found) + 1
    used = dict.fromkeys(setting.environment for setting, _ in panels)
    simulated = any(setting.simulated for setting, _ in panels)
    constant = " · ".join([constant, *([f"batch {min(batches)}"] if len(batches) == 1 else [])])
    chart = Chart(
        name="trend", title="Latency over the runs", form="lines",
        x=Axis("Run, oldest first", "integer", _ticks(runs), linear=True),
        y=Axis("Latency over that of the first run", "ratio"), panels=tuple(drawn[:PANEL_LIMIT]),
        source=combine([grid.sources[name] for name in used if name in grid.sources], simulated=simulated),
        reading="Lower is better. A ring marks the first run at a new level: a step that the noise between runs does "
        "not explain. The table names the runs.",
        alternative=_alternative(found, grid, runs), simulated=simulated,
        left_out=_left_out(len(drawn), panels.values()), constant=constant.strip(" ·"),
        origins=tuple(grid.sources[name] for name in used if name in grid.sources),
    )  # fmt: skip
    return (chart,)


def _ticks(runs: int) -> tuple[float, ...]:
    """Run 1 and every k-th after it, no more than fit beside each other."""
    return tuple(float(place) for place in range(1, runs + 1, -(-runs // _MOST_TICKS)))


def _in_order(members: Sequence[History], grid: Grid) -> list[History]:
    places = {subject: place for place, subject in enumerate(grid.subjects)}
    return sorted(members, key=lambda one: places[one.cell.subject])


def _series(one: History, grid: Grid, names: Mapping[str, str]) -> Series:
    first, subject = one.seen[0].call_s, one.cell.subject
    points = tuple(Point(seen.run + 1.0, seen.call_s / first, one.cell.batch) for seen in one.seen)
    return Series(
        subject, grid.labels[subject], names[subject], one.setting.runtime, one.setting.simulated, points,
        changes=tuple(change.at for change in one.changes),
    )  # fmt: skip


def _alternative(found: Sequence[History], grid: Grid, runs: int) -> str:
    changed = [one for one in found if one.changes]
    words = "; ".join(f"{_name(one, grid)}: {_steps(one)}" for one in changed[:SERIES_LIMIT])
    said = words or "no change of level"
    return f"Latency over the runs. {wording.plural(len(found), 'cell')} in {runs} runs. {said}."


def _left_out(panels: int, members: Iterable[Sequence[History]]) -> str:
    parts = [f"{panels - PANEL_LIMIT} of {panels} panels"] if panels > PANEL_LIMIT else []
    parts += [f"subjects beyond the first {SERIES_LIMIT}"] if any(len(one) > SERIES_LIMIT for one in members) else []
    return f"Not drawn: {' and '.join(parts)}; the table has them all." if parts else ""


def _name(one: History, grid: Grid) -> str:
    cell = one.cell
    label = f"{quantities.shorten(grid.labels[cell.subject], 40)} in {wording.runtime(one.setting)}"
    return f"{label} at batch {cell.batch:,}, prompt {cell.prompt:,}, output {cell.output:,}"


def _steps(one: History) -> str:
    return ", ".join(f"{quantities.ratio(change.ratio)} from {_place(one.seen[change.at])}" for change in one.changes)


def _place(seen: Seen) -> str:
    words = [f"run {seen.run + 1}", *([seen.date] if seen.date else []), *([seen.commit] if seen.commit else [])]
    return quantities.inert(" · ".join(words))


def tables(found: Sequence[History], grid: Grid) -> tuple[Table, ...]:
    """Return the table of histories: one row a level of a cell, so that a cell without changes has one."""
    if not found:
        return ()
    columns = (
        Column("label", "Subject"), Column("subject", "Full name"), Column("runtime", "Runtime"),
        Column("dtype", "Dtype"), Column("batch", "Batch", "integer"), Column("prompt", "Prompt", "integer"),
        Column("output", "Output", "integer"), Column("budget", "Budget"), Column("runs", "Runs", "integer"),
        Column("from_run", "From run", "integer"), Column("from_date", "From"), Column("from_commit", "Commit"),
        Column("latency_s", "Latency there", "s"), Column("change", "Change", "ratio"),
        Column("environment", "Environment"), Column("cell_id", "Cell"),
    )  # fmt: skip
    rows = tuple(row for one in found for row in _rows(one, grid))
    source = combine(list(grid.sources.values()), simulated=any(one.setting.simulated for one in found))
    hidden = frozenset({"subject", "dtype", "budget", "environment", "cell_id"})
    caption = "A row is a level that held: its median over runs, and the step to it from the level before."
    return (Table("trend", "Levels over the runs", columns, rows, source, hidden=hidden, caption=caption),)


def _rows(one: History, grid: Grid) -> list[tuple[str | float | int | None, ...]]:
    cell, steps = one.cell, [None, *(change.ratio for change in one.changes)]
    edges = [0, *(change.at for change in one.changes), len(one.seen)]
    rows: list[tuple[str | float | int | None, ...]] = []
    for (start, end), step in zip(pairwise(edges), steps, strict=True):
        first, level = one.seen[start], median(seen.call_s for seen in one.seen[start:end])
        rows.append(
            (grid.labels[cell.subject], cell.subject, cell.runtime, cell.dtype, cell.batch, cell.prompt, cell.output,
             cell.budget, end - start, first.run + 1, first.date, first.commit, level, step, one.setting.environment,
             cell.id)
        )  # fmt: skip
    return rows


def findings(found: Sequence[History], grid: Grid) -> tuple[Finding, ...]:
    """Return what changed last, the largest first; nothing where nothing did."""
    changed = sorted(
        (one for one in found if one.changes), key=lambda one: -max(abs(1 - change.ratio) for change in one.changes)
    )
    said: list[Finding] = []
    for one in changed[:_MOST_FINDINGS]:
        last = one.changes[-1]
        before, after = one.seen[last.at - 1], one.seen[last.at]
        word = "slower" if last.ratio > 1 else "faster"
        headline = f"{_name(one, grid)} became {word}: {_steps(one)}."
        cause = "The step is larger than the noise between runs, and at least two runs are on each side of it."
        said.append(Finding("trend", headline, cause, _command(before, after), figure="trend"))
    return tuple(said)


def _command(before: Seen, after: Seen) -> str:
    """The two revisions beside each other; nothing to run where a run does not say which commit it was."""
    revisions = [one.commit.removesuffix("-dirty") for one in (before, after)]
    if not all(revisions) or revisions[0] == revisions[1]:
        return ""
    return f"shortllama ab --base {revisions[0]} --head {revisions[1]}"
