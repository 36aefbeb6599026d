"""Two runs, cell by cell: what regressed, what improved, and what cannot be told. Pure.

Cells pair up by id. Times of different machines or software are not compared; speed-ups over the dense subject of the
same run are, and so are deterministic metrics. How a verdict is reached: `bench.verdicts`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import msgspec

from bench.cells import Cell
from bench.measurement import Environment, Measurement
from bench.metrics import BY_NAME, LARGEST_BATCH, LATENCY, METRICS, OUTCOME, SPEED_UP, Metric
from bench.store import Results
from bench.verdicts import (
    BEYOND,
    NOISE,
    Decision,
    Rules,
    Series,
    exactly,
    incomparable,
    simulated,
    timed,
    withdrawn,
)
from shortllama.errors import IncomparableError, InputError

NOISE_FACT = "noise_between_sessions"  # in an environment's facts, where the machine's noise was measured
MEASURED = ("ok", "unstable")


class Change(msgspec.Struct, frozen=True):
    """One metric of one cell (or, for the largest batch, of one group). `gates`: a regression fails the run."""

    cell_id: str
    cell: str
    subject: str
    metric: str
    unit: str
    gates: bool
    decision: Decision


class Pooled(msgspec.Struct, frozen=True):
    """The geometric mean of a subject's ratios (head / base) over its cells in one metric."""

    subject: str
    metric: str
    ratio: float
    cells: int


class Comparison(msgspec.Struct, frozen=True):
    """All changes, in the order of the base's rows. `differing`: the fingerprint's fields that keep times apart;
    `base_only`, `head_only`: cells without a partner; `simulated`: cells of `cells` that were."""

    changes: tuple[Change, ...]
    pooled: tuple[Pooled, ...]
    cells: int
    base_only: int
    head_only: int
    differing: tuple[str, ...]
    simulated: int

    def having(self, verdict: str) -> list[Change]:
        """Return the changes with that verdict, worst first."""
        found = [change for change in self.changes if change.decision.verdict == verdict]
        return sorted(found, key=lambda change: -change.decision.worse)


def exit_code(comparison: Comparison, *, strict: bool = False) -> int:
    """Return 3 for incomparable environments, 1 for a regression that gates, 3 for doubt if `strict`, else 0."""
    if comparison.differing:
        return 3
    if any(change.gates for change in comparison.having("regressed")):
        return 1
    return 3 if strict and comparison.having("inconclusive") else 0


def limits_of(texts: Iterable[str]) -> dict[str, float]:
    """Return the limits in texts such as "latency:5%" (or "latency:5"), as shares. Raises InputError."""
    limits: dict[str, float] = {}
    for text in texts:
        name, _, value = text.partition(":")
        if name not in BY_NAME:
            raise InputError(f"--fail-over {text!r}: no metric {name!r}; choose one of {', '.join(BY_NAME)}")
        try:
            share = float(value.strip().removesuffix("%")) / 100
        except ValueError:
            share = math.nan
        if not 0 <= share < math.inf:
            raise InputError(f"--fail-over {text!r}: {value!r} is no percentage; write for example {name}:5%")
        limits[name] = share
    return limits


# -- pairing ------------------------------------------------------------------------------------------------------


class _Pair(msgspec.Struct, frozen=True):
    """The rows of one cell in both runs, and whether their environments allow to compare times."""

    cell_id: str
    cell: Cell
    base: tuple[Measurement, ...]
    head: tuple[Measurement, ...]
    comparable: bool

    @property
    def simulated(self) -> bool:
        return self.base[0].simulated


def compare(base: Results, head: Results, limits: Mapping[str, float] | None = None) -> Comparison:
    """Return how `head` differs from `base`. `limits`: by metric, the share of worsening that is let pass.

    With limits, only the metrics named (and the exact ones) gate. Raises InputError where no cell is common or a
    sample is not positive, IncomparableError where a simulated row meets a measured one.
    """
    left, right = _by_cell(base), _by_cell(head)
    common = [cell_id for cell_id in left if cell_id in right]
    if not common:
        raise InputError(f"{base.path} and {head.path} have no cell in common; compare two runs of the same suite")
    pairs = [_pair(cell_id, left[cell_id], right[cell_id]) for cell_id in common]
    rules = Rules(dict(limits or {}), _noise((*base.environments.values(), *head.environments.values())), len(pairs))
    changes = [change for pair in pairs for change in _changes(pair, rules)]
    changes += _speed_ups(pairs, rules)
    upheld = withdrawn([change.metric for change in changes], [change.decision for change in changes])
    changes = [msgspec.structs.replace(a, decision=b) for a, b in zip(changes, upheld, strict=True)]
    return Comparison(
        changes=(*changes, *_frontiers(base, head, rules)),
        pooled=_pool(changes),
        cells=len(common),
        base_only=len(left) - len(common),
        head_only=len(right) - len(common),
        differing=_differing(pairs, base.environments, head.environments),
        simulated=sum(pair.simulated for pair in pairs),
    )


def _by_cell(results: Results) -> dict[str, tuple[Measurement, ...]]:
    rows: dict[str, tuple[Measurement, ...]] = {}
    for row in results.measurements:
        values = (*row.samples.call_s, *row.samples.prefill_s, *row.samples.step_s)
        if values and min(values) <= 0:
            raise InputError(
                f"{results.path}: {row.cell.label} ({row.cell_id}) has a sample of {min(values)} s; times are positive"
            )
        rows[row.cell_id] = (*rows.get(row.cell_id, ()), row)
    return rows


def _pair(cell_id: str, base: tuple[Measurement, ...], head: tuple[Measurement, ...]) -> _Pair:
    kinds = {row.simulated for row in (*base, *head)}
    if len(kinds) > 1:
        raise IncomparableError(
            f"{base[0].cell.label}: simulated on one side and measured on the other; compare like with like"
        )
    environments = {row.environment for row in (*base, *head)}
    return _Pair(cell_id, base[0].cell, base, head, kinds == {True} or len(environments) == 1)


def _noise(environments: Iterable[Environment]) -> float:
    known = [one.facts[NOISE_FACT] for one in environments if isinstance(one.facts.get(NOISE_FACT), int | float)]
    return max(known, default=NOISE)


def _differing(
    pairs: Sequence[_Pair], base: Mapping[str, Environment], head: Mapping[str, Environment]
) -> tuple[str, ...]:
    """Return each field that differs between the environments of a pair, with both values."""
    met = {
        tuple(dict.fromkeys(row.environment for row in (*pair.base, *pair.head))): None
        for pair in pairs
        if not pair.comparable
    }
    fields: dict[str, None] = {}
    for ids in met:
        first, *others = ((base.get(one) or head[one]).fingerprint for one in ids)
        for other in others:
            for key in sorted(first.keys() | other.keys()):
                if first.get(key) != other.get(key):
                    fields[f"{key}: {first.get(key)} -> {other.get(key)}"] = None
    return tuple(fields)


# -- one cell -----------------------------------------------------------------------------------------------------


def _changes(pair: _Pair, rules: Rules) -> list[Change]:
    """Compare every metric of one cell; a cell that did not run on a side has its outcome compared alone."""
    outcome = _outcome(pair)
    if outcome is not None:
        return [_change(pair, OUTCOME, rules, outcome)]
    found = ((metric, _decision(pair, metric, rules)) for metric in METRICS)
    return [_change(pair, metric, rules, decision) for metric, decision in found if decision is not None]


def _change(pair: _Pair, metric: Metric, rules: Rules, decision: Decision) -> Change:
    cell = pair.cell
    return Change(pair.cell_id, cell.label, cell.subject, metric.name, metric.unit, rules.gates(metric), decision)


def _outcome(pair: _Pair) -> Decision | None:
    """Return the verdict on the outcomes, None where both sides were measured."""
    before, after = _worst(pair.base), _worst(pair.head)
    base, head, reason = before.outcome, after.outcome, after.reason or before.reason
    ran = (before.outcome in MEASURED, after.outcome in MEASURED)
    if all(ran):
        return None
    if "skipped" in (base, head):
        return Decision("inconclusive", base, head, reason=reason or "not run on a side")
    if any(ran):
        verdict, worse = ("regressed", BEYOND) if ran[0] else ("improved", -BEYOND)
        return Decision(verdict, base, head, worse=worse, reason=reason)
    return Decision("equivalent", base, head, reason=reason)


def _worst(rows: Sequence[Measurement]) -> Measurement:
    return next((row for row in rows if row.outcome not in MEASURED), rows[-1])


def _decision(pair: _Pair, metric: Metric, rules: Rules) -> Decision | None:
    """Return the verdict on one metric, None where a side lacks it or the environments forbid it."""
    base, head = _series(pair.base, metric), _series(pair.head, metric)
    if not base or not head:
        return None
    if metric.exact:
        return exactly(metric, base[-1][1], head[-1][1], rules) if metric.anywhere or pair.comparable else None
    return _timed(pair, metric, base, head, rules) if pair.comparable else incomparable(base, head)


def _series(rows: Iterable[Measurement], metric: Metric) -> list[tuple[int, float]]:
    return [(row.session.pair, value) for row in rows if (value := metric.value(row)) is not None]


def _timed(pair: _Pair, metric: Metric, base: Series, head: Series, rules: Rules) -> Decision:
    if pair.simulated:
        return simulated(metric, base, head, rules)
    decision = timed(metric, base, head, rules)
    if any(row.outcome == "unstable" for row in (*pair.base, *pair.head)):
        return msgspec.structs.replace(decision, verdict="inconclusive", reason="a session was unstable")
    return decision


# -- over cells ---------------------------------------------------------------------------------------------------


def dense_of(subject: str, subjects: Iterable[str]) -> str | None:
    """Return the subject among `subjects` that MODEL/PLAN was made from; None for a dense one."""
    return max((name for name in subjects if subject.startswith(f"{name}/")), key=len, default=None)


def _speed_ups(pairs: Sequence[_Pair], rules: Rules) -> list[Change]:
    """Compare latency(dense) / latency(subject) of the same session where the times themselves must not be."""
    subjects = {pair.cell.subject for pair in pairs}
    parents = {subject: dense_of(subject, subjects) for subject in subjects}
    by_cell = {pair.cell: pair for pair in pairs}
    found: list[Change] = []
    for pair in pairs:
        parent = parents[pair.cell.subject]
        dense = by_cell.get(msgspec.structs.replace(pair.cell, subject=parent)) if parent else None
        if dense is None or pair.comparable:
            continue
        base, head = _speed_up(dense.base, pair.base), _speed_up(dense.head, pair.head)
        if base and head:
            found.append(_change(pair, SPEED_UP, rules, _timed(pair, SPEED_UP, base, head, rules)))
    return found


def _speed_up(dense: Iterable[Measurement], pruned: Iterable[Measurement]) -> list[tuple[int, float]]:
    latencies = dict(_series(dense, LATENCY))
    return [(number, latencies[number] / own) for number, own in _series(pruned, LATENCY) if number in latencies]


def _frontiers(base: Results, head: Results, rules: Rules) -> list[Change]:
    """Compare the largest batches of the groups that both runs have searched in one environment."""
    before = {row.cell.id: row for row in base.frontiers}
    found: list[Change] = []
    for row in head.frontiers:
        old = before.get(row.cell.id)
        if old is None or old.largest_batch is None or row.largest_batch is None:
            continue
        if old.environment == row.environment or row.simulated:
            decision = exactly(LARGEST_BATCH, float(old.largest_batch), float(row.largest_batch), rules)
            name, unit = LARGEST_BATCH.name, LARGEST_BATCH.unit
            found.append(Change(row.cell.id, row.cell.label, row.cell.subject, name, unit, True, decision))
    return found


def _pool(changes: Iterable[Change]) -> tuple[Pooled, ...]:
    logs: dict[tuple[str, str], list[float]] = {}
    for change in changes:
        ratio = change.decision.ratio
        if not BY_NAME.get(change.metric, OUTCOME).exact and change.decision.verdict != "incomparable" and ratio:
            logs.setdefault((change.subject, change.metric), []).append(math.log(ratio))
    return tuple(
        Pooled(subject, metric, math.exp(math.fsum(values) / len(values)), len(values))
        for (subject, metric), values in logs.items()
    )
