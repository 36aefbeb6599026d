"""Two runs, cell by cell: what regressed, what improved, and what cannot be told. Pure.

Times of different machines or software are not compared; speed-ups over the dense subject of the same run are, and so
are deterministic metrics. What belongs together: `bench.pairing`; how a verdict is reached: `bench.verdicts`.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence

import msgspec

from bench import experiment, noise, pairing
from bench.cells import Cell
from bench.measurement import Environment, Measurement
from bench.metrics import BY_NAME, LARGEST_BATCH, LATENCY, METRICS, OUTCOME, SPEED_UP, Metric
from bench.pairing import Ends, Pair
from bench.store import Results
from bench.verdicts import (
    BEYOND,
    NOISE,
    Decision,
    Rules,
    Series,
    by_pairs,
    exactly,
    incomparable,
    log_ratios,
    ratio_of,
    simulated,
    timed,
    withdrawn,
)
from shortllama.errors import InputError

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
    """The geometric mean of a subject's ratios (head / base) over its cells in one metric.

    Where sessions are paired in all of these cells, `decision` judges that mean pair by pair: cells of one session
    share its noise, so they are averaged before they are judged. It never gates by itself.
    """

    subject: str
    metric: str
    ratio: float
    cells: int
    decision: Decision | None = None


class Comparison(msgspec.Struct, frozen=True):
    """All changes, in the order of the base's rows. `differing`: the fingerprint's fields that keep times apart;
    `base_only`, `head_only`: cells without a partner; `simulated`: cells of `cells` that were; `notes`: what else a
    reader must know of how the runs were made."""

    changes: tuple[Change, ...]
    pooled: tuple[Pooled, ...]
    cells: int
    base_only: int
    head_only: int
    differing: tuple[str, ...]
    simulated: int
    notes: tuple[str, ...] = ()

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


# -- the comparison ---------------------------------------------------------------------------------------------------


def compare(base: Results, head: Results, limits: Mapping[str, float] | None = None) -> Comparison:
    """Return how `head` differs from `base`. `limits`: by metric, the share of worsening that is let pass.

    With limits, only the metrics named (and the exact ones) gate. Raises InputError where no cell is common or a
    sample is not positive, IncomparableError where a simulated row meets a measured one.
    """
    design = experiment.common(base, head)
    found = pairing.pair(base, head, design)
    pairs = found.cells
    environments = (*base.environments.values(), *head.environments.values())
    rules = Rules(dict(limits or {}), _noise(environments), max(1, len(pairs)), design.looks if design else None)
    changes = [change for pair in pairs for change in _changes(pair, rules)]
    changes += _speed_ups(pairs, rules)
    upheld = withdrawn([change.metric for change in changes], [change.decision for change in changes])
    changes = [msgspec.structs.replace(a, decision=b) for a, b in zip(changes, upheld, strict=True)]
    return Comparison(
        changes=(*changes, *(_largest(ends, rules) for ends in found.ends if ends.comparable)),
        pooled=_pool(pairs, rules),
        cells=len(pairs),
        base_only=found.base_only,
        head_only=found.head_only,
        differing=pairing.differing(found, base.environments, head.environments),
        simulated=sum(pair.simulated for pair in pairs),
        notes=design.notes if design else (),
    )


def _noise(environments: Iterable[Environment]) -> float:
    stored = (one.facts.get(noise.BETWEEN_FACT) for one in environments)
    return max((value for value in stored if isinstance(value, int | float)), default=NOISE)


# -- one cell -----------------------------------------------------------------------------------------------------


def _changes(pair: Pair, rules: Rules) -> list[Change]:
    """Compare every metric of one cell; a cell that did not run on a side has its outcome compared alone."""
    outcome = _outcome(pair)
    if outcome is not None:
        return [_change(pair, OUTCOME, rules, outcome)]
    found = ((metric, _decision(pair, metric, rules)) for metric in METRICS)
    return [_change(pair, metric, rules, decision) for metric, decision in found if decision is not None]


def _change(pair: Pair, metric: Metric, rules: Rules, decision: Decision) -> Change:
    cell = pair.cell
    return Change(pair.cell_id, label(cell), cell.subject, metric.name, metric.unit, rules.gates(metric), decision)


def label(cell: Cell) -> str:
    """Return a cell's name for people; a test of a foreign suite generates nothing, so its name is all there is."""
    return cell.label if cell.output else cell.subject


def _outcome(pair: Pair) -> Decision | None:
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


def _decision(pair: Pair, metric: Metric, rules: Rules) -> Decision | None:
    """Return the verdict on one metric, None where a side lacks it or the environments forbid it."""
    base, head = _series(pair.base, metric), _series(pair.head, metric)
    if not base or not head:
        return None
    if metric.exact:
        return exactly(metric, base[-1][1], head[-1][1], rules) if metric.anywhere or pair.comparable else None
    return _timed(pair, metric, base, head, rules) if pair.comparable else incomparable(base, head)


def _series(rows: Iterable[Measurement], metric: Metric) -> list[tuple[int, float]]:
    return [(row.session.pair, value) for row in rows if (value := metric.value(row)) is not None]


def _timed(pair: Pair, metric: Metric, base: Series, head: Series, rules: Rules) -> Decision:
    if pair.simulated:
        return simulated(metric, base, head, rules)
    decision = timed(metric, base, head, rules)
    if any(row.outcome == "unstable" for row in (*pair.base, *pair.head)):
        return msgspec.structs.replace(decision, verdict="inconclusive", reason="a session was unstable")
    return decision


# -- over cells -------------------------------------------------------------------------------------------------------


def dense_of(subject: str, subjects: Collection[str]) -> str | None:
    """Return the subject among `subjects` that MODEL/PLAN was made from; None for a dense one."""
    above = subject.rpartition("/")[0]
    while above and above not in subjects:
        above = above.rpartition("/")[0]
    return above or None


def _speed_ups(pairs: Sequence[Pair], rules: Rules) -> list[Change]:
    """Compare latency(dense) / latency(subject) of the same session where the times themselves must not be."""
    apart = [pair for pair in pairs if not pair.comparable]
    subjects = {pair.cell.subject for pair in apart}
    by_cell = {pair.cell: pair for pair in apart}
    found: list[Change] = []
    for pair in apart:
        parent = dense_of(pair.cell.subject, subjects)
        dense = by_cell.get(msgspec.structs.replace(pair.cell, subject=parent)) if parent else None
        if dense is None:
            continue
        base, head = _speed_up(dense.base, pair.base), _speed_up(dense.head, pair.head)
        if base and head:
            found.append(_change(pair, SPEED_UP, rules, _timed(pair, SPEED_UP, base, head, rules)))
    return found


def _speed_up(dense: Iterable[Measurement], pruned: Iterable[Measurement]) -> list[tuple[int, float]]:
    latencies = dict(_series(dense, LATENCY))
    return [(number, latencies[number] / own) for number, own in _series(pruned, LATENCY) if number in latencies]


def _largest(ends: Ends, rules: Rules) -> Change:
    """Compare the largest batches of one group."""
    return Change(
        ends.base.cell.id,
        label(ends.cell),
        ends.cell.subject,
        LARGEST_BATCH.name,
        LARGEST_BATCH.unit,
        True,
        _largest_decision(ends, rules),
    )


def _largest_decision(ends: Ends, rules: Rules) -> Decision:
    """Exact, where both runs met the end of memory, or where a lower bound suffices to tell."""
    before, after = ends.base.largest_batch, ends.head.largest_batch
    if before is None or after is None:
        missing = ends.base if before is None else ends.head
        return Decision("inconclusive", before, after, reason=missing.reason or "not measured on a side")
    found = exactly(LARGEST_BATCH, float(before), float(after), rules)
    unsure = next((row for row in (ends.base, ends.head) if row.non_monotone), None)
    if unsure is not None:
        return msgspec.structs.replace(found, verdict="inconclusive", reason="a larger batch ran than one that failed")
    if (ends.open_head and after < before) or (ends.open_base and after > before):
        return msgspec.structs.replace(found, verdict="inconclusive", reason="the smaller one is only a lower bound")
    return found


def _pool(pairs: Sequence[Pair], rules: Rules) -> tuple[Pooled, ...]:
    """Return the geometric mean of every subject and noisy metric, over the cells whose values may be compared."""
    members: dict[tuple[str, str], list[tuple[Series, Series]]] = {}
    for pair in pairs:
        if not pair.comparable or _outcome(pair) is not None:
            continue
        for metric in METRICS:
            if not metric.exact and (base := _series(pair.base, metric)) and (head := _series(pair.head, metric)):
                members.setdefault((pair.cell.subject, metric.name), []).append((base, head))
    alone = msgspec.structs.replace(rules, tests=1)
    return tuple(_pooled(subject, BY_NAME[name], sides, alone) for (subject, name), sides in members.items())


def _pooled(subject: str, metric: Metric, sides: Sequence[tuple[Series, Series]], rules: Rules) -> Pooled:
    logs = [log_ratios(*side) for side in sides]
    common = sorted(set(logs[0]).intersection(*logs[1:]))
    if len(common) < 2 or len(sides) < 2:
        singles = [math.log(ratio_of(*side)) for side in sides]
        return Pooled(subject, metric.name, math.exp(math.fsum(singles) / len(singles)), len(sides))
    decision = by_pairs(metric, [math.fsum(one[number] for one in logs) / len(logs) for number in common], rules)
    return Pooled(subject, metric.name, decision.ratio or 1.0, len(sides), decision)
