"""Rows of results into summaries and groups: the only place that turns raw samples into statistics. Pure, linear.

A summary is one row of the results. A group is one subject under one setting, batch ascending, where several sessions
of a cell have become one. Figures, tables and findings all read the Grid built here and never the rows.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from statistics import median

import msgspec

from bench import timing
from bench.cells import Cell
from bench.measurement import Frontier, Measurement
from bench.regimes import Limits
from bench.report.palette import kind
from bench.report.predictions import Predicted
from bench.report.quantities import inert
from bench.report.values import Source
from bench.timing import Estimate
from shortllama.evaluation.results import Perplexity
from shortllama.shape import ModelShape

OOM = ("oom", "oom-implied")
MEASURED = ("ok", "unstable")


class Setting(msgspec.Struct, frozen=True, order=True):
    """All of a cell but its subject and batch, and where it ran. Rows of one setting are compared with each other."""

    environment: str
    simulated: bool
    runtime: str
    dtype: str
    attention: str
    prompt: int
    output: int
    budget: str
    timing: str


class Summary(msgspec.Struct, frozen=True):
    """One cell with its statistics (see bench.timing); `speedup` is over its dense subject at the same batch.

    `limits`: what limits the cell (see bench.regimes), None for a cell without times.
    """

    row: Measurement
    setting: Setting
    call_s: Estimate | None
    throughput: Estimate | None
    peak_bytes: int | None
    speedup: Estimate | None = None
    limits: Limits | None = None

    @property
    def counts(self) -> bool:
        """Whether its time may be compared."""
        return self.call_s is not None and self.row.outcome == "ok"

    @property
    def cell(self) -> Cell:
        """The cell."""
        return self.row.cell


class Group(msgspec.Struct, frozen=True):
    """One subject under one setting. `cells`: one summary a batch, ascending."""

    subject: str
    setting: Setting
    cells: tuple[Summary, ...]
    frontier: Frontier | None = None

    @property
    def measured(self) -> tuple[Summary, ...]:
        """The cells whose times count: an unstable cell has some, but nothing is to be read from them."""
        return tuple(cell for cell in self.cells if cell.counts)

    @property
    def fits(self) -> int | None:
        """The largest batch seen to fit."""
        if self.frontier is not None:
            return self.frontier.largest_batch
        return max((c.cell.batch for c in self.cells if c.row.outcome in MEASURED), default=None)

    @property
    def fails(self) -> int | None:
        """The smallest batch seen not to fit, above any that fits; None where memory never ended."""
        above = self.fits or 0
        seen = [c.cell.batch for c in self.cells if c.row.outcome in OOM]
        seen += list(self.frontier.fails) if self.frontier is not None else []
        return min((batch for batch in seen if batch > above), default=None)


class Grid(msgspec.Struct, frozen=True):
    """All that a report draws from. Settings are in order of first appearance, subjects as `ordered` puts them.

    `baseline`: the dense subject of each pruned one; `labels`: names short enough for a figure, unique;
    `shapes`: of the subjects that are at hand; `verdicts`: of the gate, on the latency of cells of a judged run, by
    setting, subject and batch.
    """

    sources: Mapping[str, Source]
    rows: tuple[Summary, ...]
    groups: Mapping[Setting, Mapping[str, Group]]
    subjects: tuple[str, ...]
    baseline: Mapping[str, str]
    labels: Mapping[str, str]
    parameters: Mapping[str, int]
    perplexity: Mapping[str, Mapping[str, Perplexity]]
    predictions: tuple[Predicted, ...] = ()
    shapes: Mapping[str, ModelShape] = {}
    verdicts: Mapping[tuple[Setting, str, int], str] = {}

    @property
    def dense(self) -> frozenset[str]:
        """Subjects that others are compared with, and models named without a plan."""
        return frozenset(self.baseline.values()) | {s for s in self.subjects if "/" not in s}


def grid(
    measurements: Sequence[Measurement],
    frontiers: Sequence[Frontier],
    sources: Mapping[str, Source],
    perplexity: Mapping[str, Mapping[str, Perplexity]],
    limits: Sequence[Limits | None] = (),
    predictions: tuple[Predicted, ...] = (),
    shapes: Mapping[str, ModelShape] | None = None,
    keys: Sequence[str] = (),
    verdicts: Mapping[tuple[Setting, str, int], str] | None = None,
) -> Grid:
    """Return the Grid of these rows; time and memory grow linearly with them. `limits` is parallel to the rows.

    So is `keys`: under which source a row stands where that is not its environment.
    """
    names = dict.fromkeys([m.cell.subject for m in measurements] + [f.cell.subject for f in frontiers])
    parameters = {m.cell.subject: m.parameters for m in measurements if m.parameters is not None}
    baseline = baselines(tuple(names), parameters)
    subjects = ordered(tuple(names), baseline)
    known = limits or (None,) * len(measurements)
    places = keys or [row.environment for row in measurements]
    summaries = [summarise(*each) for each in zip(measurements, known, places, strict=True)]
    rows = in_order(with_speedups(summaries, baseline), subjects)
    return Grid(
        sources,
        rows,
        _groups(rows, frontiers),
        subjects,
        baseline,
        labels(subjects, baseline),
        parameters,
        perplexity,
        predictions,
        shapes or {},
        verdicts or {},
    )


def ordered(subjects: Sequence[str], baseline: Mapping[str, str]) -> tuple[str, ...]:
    """Return dense subjects, then depth-pruned, width-pruned and others, each by name with numbers as numbers.

    A sweep runs its subjects in a seeded order; a report has one order, and so one colour a subject, for all runs.
    """
    dense = set(baseline.values()) | {subject for subject in subjects if "/" not in subject}
    kinds = ("dense", "depth", "width", "other")

    def place(subject: str) -> tuple[int, list[tuple[int, float, str]]]:
        parts = re.findall(r"\d+(?:\.\d+)?|\D+", subject)
        natural = [(0, float(part), "") if part[0].isdecimal() else (1, 0.0, part) for part in parts]
        return kinds.index(kind(subject, subject in dense)), natural

    return tuple(sorted(subjects, key=place))


def in_order(rows: Sequence[Summary], subjects: Sequence[str]) -> tuple[Summary, ...]:
    """Return the rows setting by setting as they first appear, subjects in their order, batch ascending.

    Settings of two runs on one environment stand beside each other.
    """
    seen = {row.setting: row.row.environment for row in rows}
    alike = [msgspec.structs.replace(setting, environment=name) for setting, name in seen.items()]
    first = {family: place for place, family in reversed(list(enumerate(alike)))}
    places = zip(seen, alike, range(len(seen)), strict=True)
    settings = {setting: (first[family], place) for setting, family, place in places}
    order = {subject: place for place, subject in enumerate(subjects)}
    return tuple(sorted(rows, key=lambda r: (settings[r.setting], order[r.cell.subject], r.cell.batch)))


def setting_of(row: Measurement, key: str = "") -> Setting:
    """Return the setting of a row; `key`: its source, where that is not its environment."""
    cell = row.cell
    return Setting(
        key or row.environment, row.simulated, cell.runtime, cell.dtype, cell.attention, cell.prompt, cell.output,
        cell.budget, row.timing,
    )  # fmt: skip


def summarise(row: Measurement, limits: Limits | None = None, key: str = "") -> Summary:
    """Return the statistics of one row, without a speed-up; `key` as in `setting_of`."""
    memory, setting = row.memory, setting_of(row, key)
    peaks = (memory.allocated, memory.reserved, memory.device_used)
    peak = next((value for value in peaks if value is not None), None)
    if row.outcome not in MEASURED:
        return Summary(row, setting, None, None, peak)
    return Summary(row, setting, timing.latency(row), timing.throughput(row), peak, limits=limits)


def quotient(above: Estimate, below: Estimate) -> Estimate:
    """Return above / below for independent estimates, its interval formed on the log scale.

    Zou and Donner's MOVER (Stat. Med. 27, 2008): the distances from each estimate to its own limits add in quadrature,
    which keeps unequal arms unequal. It knows the noise within a session only. No interval without both.
    """
    value, count = above.value / below.value, min(above.count, below.count)
    if above.low is None or above.high is None or below.low is None or below.high is None or below.low <= 0:
        return Estimate(value, None, None, count)
    down = math.hypot(math.log(above.value / above.low), math.log(below.high / below.value))
    up = math.hypot(math.log(above.high / above.value), math.log(below.value / below.low))
    return Estimate(value, value * math.exp(-down), value * math.exp(up), count)


def baselines(subjects: Sequence[str], parameters: Mapping[str, int]) -> dict[str, str]:
    """Return the dense subject of each pruned one.

    `A/plan` is compared with `A` where `A` was measured too. A folder whose name tells nothing is compared with the
    first subject of the run, provided that one is known to be larger.
    """
    known = set(subjects)
    found: dict[str, str] = {}
    for subject in subjects:
        prefix = subject
        while "/" in prefix:
            prefix = prefix.rsplit("/", 1)[0]
            if prefix in known:
                found[subject] = prefix
                break
    first = subjects[0] if subjects else ""
    for subject in subjects:
        larger = parameters.get(first, 0) > parameters.get(subject, math.inf)
        if subject not in found and "/" in subject and first not in found and larger:
            found[subject] = first
    return found


def labels(subjects: Sequence[str], baseline: Mapping[str, str]) -> dict[str, str]:
    """Return short names: the plan alone where there is only one dense model and no two plans become equal."""
    short = {s: s for s in subjects}
    if len(set(baseline.values())) == 1:
        short = {s: s.removeprefix(f"{baseline[s]}/") if s in baseline else s for s in subjects}
    if len(set(short.values())) < len(short):
        short = {s: s for s in subjects}
    return {subject: inert(label) or "(unnamed)" for subject, label in short.items()}


def with_speedups(rows: Iterable[Summary], baseline: Mapping[str, str]) -> tuple[Summary, ...]:
    """Return the rows with their speed-up over the dense subject.

    The k-th time that a cell was measured is compared with the k-th time of its dense cell, so that repeated runs are
    compared run by run; the last dense one stands for those that are missing.
    """
    rows = list(rows)
    dense: dict[tuple[object, ...], list[Estimate]] = {}
    for row in rows:
        if row.call_s is not None and row.counts:
            dense.setdefault((row.cell.subject, row.cell.batch, row.setting), []).append(row.call_s)
    met: dict[tuple[object, ...], int] = {}
    done: list[Summary] = []
    for row in rows:
        others = dense.get((baseline.get(row.cell.subject), row.cell.batch, row.setting))
        if others is None or row.call_s is None or not row.counts:
            done.append(row)
            continue
        key = (row.cell.subject, row.cell.batch, row.setting)
        place = met[key] = met.get(key, -1) + 1
        gain = quotient(others[min(place, len(others) - 1)], row.call_s)
        done.append(msgspec.structs.replace(row, speedup=gain))
    return tuple(done)


def _groups(rows: Sequence[Summary], frontiers: Sequence[Frontier]) -> dict[Setting, dict[str, Group]]:
    sessions: dict[Setting, dict[str, dict[int, list[Summary]]]] = {}
    for row in rows:
        subjects = sessions.setdefault(row.setting, {})
        subjects.setdefault(row.cell.subject, {}).setdefault(row.cell.batch, []).append(row)
    limits: dict[tuple[str, bool, Cell], Frontier] = {(f.environment, f.simulated, f.cell): f for f in frontiers}
    groups: dict[Setting, dict[str, Group]] = {}
    for setting, subjects in sessions.items():
        for subject, batches in subjects.items():
            cells = tuple(merge(batches[batch]) for batch in sorted(batches))
            limit = limits.pop((setting.environment, setting.simulated, cells[0].cell.group), None)
            groups.setdefault(setting, {})[subject] = Group(subject, setting, cells, limit)
    for (environment, simulated, cell), frontier in limits.items():
        setting = Setting(
            environment, simulated, cell.runtime, cell.dtype, cell.attention, cell.prompt, cell.output, cell.budget, ""
        )
        groups.setdefault(setting, {})[cell.subject] = Group(cell.subject, setting, (), frontier)
    return groups


def merge(sessions: Sequence[Summary]) -> Summary:
    """Return one summary of a cell's sessions: medians of their estimates, with the range over sessions as interval.

    One process never stands for another, so samples are not pooled. A measured session outranks one that was not.
    """
    measured = [session for session in sessions if session.counts]
    if len(measured) < 2:
        return (measured or list(sessions))[-1]
    peaks = [session.peak_bytes for session in measured if session.peak_bytes is not None]
    return msgspec.structs.replace(
        measured[-1],
        call_s=_spread([session.call_s for session in measured]),
        throughput=_spread([session.throughput for session in measured]),
        peak_bytes=max(peaks, default=None),
        speedup=_spread([session.speedup for session in measured]),
    )


def _spread(estimates: Sequence[Estimate | None]) -> Estimate | None:
    values = [estimate.value for estimate in estimates if estimate is not None]
    return Estimate(median(values), min(values), max(values), len(values)) if values else None
