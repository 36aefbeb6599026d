"""Limits that a test sets for one cell, and what of them a row breaks, in sentences. Pure.

A time breaks its limit where its whole 95 % interval lies beyond it: what may be noise does not fail a test. Operations
and memory are exact. Against a baseline, the rules are those of `shortllama compare` for one session a side.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import msgspec

from bench import comparison, timing
from bench.cells import budget_bytes
from bench.measurement import Measurement
from bench.metrics import BY_NAME
from bench.report import quantities
from bench.store import Results
from bench.timing import Estimate
from shortllama.errors import InputError

_SECONDS = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "µs": 1e-6}
RECORD = "record one with pytest --bench-out"
_CALLED_MOST = 4


class Thresholds(msgspec.Struct, frozen=True):
    """None: no limit. Seconds, new tokens a second, bytes, operations of a decode step; `baseline`: a run's folder;
    `fail_over`: shares by metric, as `compare --fail-over` takes them."""

    max_latency: float | None = None
    min_throughput: float | None = None
    max_memory: int | None = None
    max_ops: int | None = None
    baseline: str | None = None
    fail_over: dict[str, float] = {}


def read(given: Mapping[str, Any]) -> Thresholds:
    """Return the limits in a marker's keywords: times as seconds or "50ms", memory as bytes or "512MiB".

    Raises InputError for unknown keywords and for values that are no such quantity.
    """
    known = Thresholds.__struct_fields__
    for name in given:
        if name not in known:
            raise InputError(f"{name} is no limit; there are {', '.join(known)}")
    values = dict(given)
    readers = {"max_latency": _time, "min_throughput": _number, "max_memory": _size, "max_ops": _number}
    for name, reader in readers.items():
        if name in values:
            values[name] = reader(name, values[name])
    over = values.get("fail_over", ())
    values["fail_over"] = comparison.limits_of([over] if isinstance(over, str) else over)
    if values["fail_over"] and "baseline" not in values:
        raise InputError("fail_over compares with a baseline; give baseline=RUN too")
    if "baseline" in values:
        values["baseline"] = str(values["baseline"])
    return Thresholds(**values)


def _time(name: str, value: Any) -> float:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(s|ms|us|µs)", value) if isinstance(value, str) else None
    return float(match[1]) * _SECONDS[match[2]] if match else _number(name, value, 'seconds, or for example "50ms"')


def _size(name: str, value: Any) -> int:
    size = budget_bytes(value) if isinstance(value, str) else round(_number(name, value, 'bytes, or "512MiB"'))
    if size is None:
        raise InputError(f'{name}="none" is no limit; leave it out')
    return size


def _number(name: str, value: Any, wanted: str = "a number above 0") -> float:
    fine = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value > 0
    if not fine:
        raise InputError(f"{name}={value!r} is not {wanted}")
    return value


# -- judging -----------------------------------------------------------------------------------------------------------


def broken(row: Measurement, limits: Thresholds, *, timed: bool = True) -> list[str]:
    """Return a sentence for each limit that a row breaks; without `timed`, times are not looked at."""
    wanted = [name for name in ("max_latency", "min_throughput", "max_memory", "max_ops") if getattr(limits, name)]
    if row.outcome != "ok":
        reason = f" ({row.reason})" if row.reason else ""
        return [f"{row.outcome}{reason}; {', '.join(wanted)} cannot be met"] if wanted else []
    found: list[str | None] = []
    if timed and limits.max_latency is not None:
        found.append(_latency(timing.latency(row), limits.max_latency))
    if timed and limits.min_throughput is not None:
        found.append(_throughput(timing.throughput(row), limits.min_throughput))
    if limits.max_memory is not None:
        found.append(_memory(row, limits.max_memory))
    if limits.max_ops is not None:
        found.append(_operations(row, limits.max_ops))
    return [one for one in found if one]


def _latency(seen: Estimate | None, limit: float) -> str | None:
    if seen is None or (seen.value if seen.low is None else seen.low) <= limit:
        return None
    return f"latency {_estimate(seen, 's')} is over max_latency {quantities.seconds(limit)}; {_SLOW}"


def _throughput(seen: Estimate | None, limit: float) -> str | None:
    if seen is None or (seen.value if seen.high is None else seen.high) >= limit:
        return None
    words = f"{_estimate(seen, 'tokens/s')} tokens/s"
    return f"throughput {words} is under min_throughput {quantities.significant(limit)} tokens/s; {_SLOW}"


_SLOW = "to tell a slower machine from slower code, run shortllama ab --base REV --head REV"


def _estimate(seen: Estimate, unit: str) -> str:
    text = quantities.text(seen.value, unit)
    if seen.low is None or seen.high is None:
        return f"{text} (only {seen.count} repeats, no interval)"
    return f"{text} (95 % interval {quantities.interval((seen.low, seen.high), unit)})"


def _memory(row: Measurement, limit: int) -> str | None:
    peak = row.memory.allocated
    if peak is None:
        why = row.memory.reasons.get("allocated", "not measured here")
        return f"peak memory is not known ({why}), so max_memory cannot be judged; leave the limit out here"
    if peak <= limit:
        return None
    predicted = row.memory.analytic
    model = f", the memory model says {quantities.size(predicted)}" if predicted else ""
    return f"peak memory {quantities.size(peak)} is over max_memory {quantities.size(limit)}{model}; see shortllama oom"


def _operations(row: Measurement, limit: int) -> str | None:
    counted = row.bounds.ops_per_token if row.bounds else None
    if not counted:
        return f"runtime {row.cell.runtime} calls no operations that can be counted; set max_ops with eager or static"
    total = sum(counted.values())
    if total <= limit:
        return None
    most = sorted(counted.items(), key=lambda pair: -pair[1])[:_CALLED_MOST]
    words = ", ".join(f"{name} {count}" for name, count in most)
    return f"{total} operations a token are over max_ops {limit} (most: {words}); look for what is called anew"


def regressed(head: Results, base: Results, limits: Thresholds, *, timed: bool = True) -> list[str]:
    """Return a sentence for each metric of the row in `head` that is worse than in `base` beyond its limit.

    Without `fail_over`, exact metrics decide alone. Where only times could decide and the machine or its software is
    another, that is a sentence too: a gate that compares nothing must not pass.
    """
    (row,) = head.measurements
    cells = {one.cell_id for one in base.measurements}
    if row.cell_id not in cells:
        return [f"baseline {limits.baseline} has no row of this cell; {RECORD}, and name that run"]
    compared = comparison.compare(base, head, limits.fail_over)
    times = [name for name in limits.fail_over if not BY_NAME[name].exact]
    found: list[str] = []
    if compared.differing and times and timed:
        fields = ", ".join(compared.differing)
        found.append(
            f"{', '.join(times)} cannot be compared with baseline {limits.baseline}: other {fields}; {RECORD} here"
        )
    for change in compared.having("regressed"):
        if change.gates and (timed or BY_NAME.get(change.metric) is None or BY_NAME[change.metric].exact):
            found.append(_regression(change, limits.baseline or ""))
    return found


def _regression(change: comparison.Change, baseline: str) -> str:
    decision = change.decision
    before, after = (quantities.text(value, change.unit) for value in (decision.base, decision.head))
    ratio = f" ({quantities.ratio(decision.ratio)})" if decision.ratio else ""
    reason = f"; {decision.reason}" if decision.reason else ""
    return (
        f"{change.metric} {before} in baseline {baseline}, now {after}{ratio}{reason}; where it is meant, {RECORD} anew"
    )
