"""Efficiency factors from measured cells, and what the same prediction is worth on cells that it has not seen. Pure.

`prediction` says that a call takes roof / efficiency + output x (blocks x block_s + step_s). That is linear in
1 / efficiency, block_s and step_s, none of which is negative, and where the roof is a real one nothing is faster than
it. They are fitted for each runtime and dtype by least squares on the log of the time, so that a cell counts by how
many per cent it is missed, however long it takes: Gauss-Newton steps, each an exact non-negative least-squares problem
of three unknowns, which is small enough to try every set of those that are not zero.

Where all cells have one number of blocks, block_s and step_s cannot be told apart, and the first takes it all.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations
from statistics import median
from typing import TypeAlias

import msgspec

from bench import physics, prediction, timing
from bench.cells import Cell
from bench.devices import Device
from bench.measurement import Measurement
from bench.prediction import Overheads
from shortllama.shape import ModelShape

LEAST_CELLS = 3  # as many as there are factors
STEPS = 60
_SLOWEST_NOMINAL = 0.01  # least 1 / efficiency on a nominal device, whose figures are no peaks

Key: TypeAlias = tuple[str, str]  # runtime and dtype
Factors: TypeAlias = Mapping[Key, Overheads]


class Observed(msgspec.Struct, frozen=True):
    """One measured cell: seconds of a call."""

    shape: ModelShape
    cell: Cell
    call_s: float


class Error(msgspec.Struct, frozen=True):
    """How far predictions are from measured times, as factors of 1 or more: in the middle, and at worst.

    `bias`: predicted over measured, in the middle; below 1 where cells take longer than predicted.
    """

    typical: float
    worst: float
    bias: float
    cells: int


def observed(rows: Iterable[Measurement], shapes: Mapping[str, ModelShape]) -> tuple[Observed, ...]:
    """Return the measured cells of subjects with a known shape; several sessions of a cell count as their median."""
    found: dict[Cell, list[float]] = {}
    for row in rows:
        call = timing.latency(row) if row.outcome == "ok" and not row.simulated else None
        shape = shapes.get(row.cell.subject)
        # Of quantised weights fewer bytes are read, and more work is done on them: other factors than a dtype's.
        if call is not None and shape is not None and not shape.quantised:
            found.setdefault(row.cell, []).append(call.value)
    return tuple(Observed(shapes[cell.subject], cell, median(calls)) for cell, calls in found.items())


def calibrate(cells: Sequence[Observed], device: Device) -> dict[Key, Overheads]:
    """Return the factors of each runtime and dtype with at least 3 cells, by their times on `device`.

    The roof is the device's own; cells in a dtype for which it has no rate are left out.
    """
    groups: dict[Key, list[Observed]] = {}
    for one in cells:
        if one.cell.dtype in device.flops:
            groups.setdefault((one.cell.runtime, one.cell.dtype), []).append(one)
    return {key: _fit(group, device) for key, group in groups.items() if len(group) >= LEAST_CELLS}


def error(cells: Sequence[Observed], device: Device, factors: Factors | None = None) -> Error | None:
    """Return the error of predicting these cells, by `factors` (None: those that are shipped); None without cells that
    can be predicted."""
    logs: list[float] = []
    for one in cells:
        given = None if factors is None else factors.get((one.cell.runtime, one.cell.dtype))
        if one.cell.dtype in device.flops and (factors is None or given is not None):
            logs.append(math.log(prediction.call_s(one.shape, one.cell, device, given) / one.call_s))
    return _error(logs) if logs else None


def held_out(cells: Sequence[Observed], device: Device) -> Error | None:
    """Return the error on cells that the fit has not seen: fitted on one half, tested on the other, both ways round.

    The halves are drawn by the cells' hashes, so that they are the same each time. None where a half is too small.
    """
    logs: list[float] = []
    groups: dict[Key, list[Observed]] = {}
    for one in cells:
        groups.setdefault((one.cell.runtime, one.cell.dtype), []).append(one)
    for key, group in groups.items():
        ordered = sorted(group, key=lambda one: hashlib.sha256(one.cell.id.encode()).digest())
        for half, other in ((ordered[::2], ordered[1::2]), (ordered[1::2], ordered[::2])):
            factors = calibrate(half, device).get(key)
            if factors is not None:
                logs += [math.log(prediction.call_s(o.shape, o.cell, device, factors) / o.call_s) for o in other]
    return _error(logs) if logs else None


def _error(logs: Sequence[float]) -> Error:
    sizes = [abs(one) for one in logs]
    return Error(math.exp(median(sizes)), math.exp(max(sizes)), math.exp(median(logs)), len(logs))


# -- the fit ----------------------------------------------------------------------------------------------------------


def _fit(cells: Sequence[Observed], device: Device) -> Overheads:
    """Minimise the sum of squares of log(predicted / measured)."""
    terms = [_terms(one, device) for one in cells]
    times = [one.call_s for one in cells]
    least = (_SLOWEST_NOMINAL if device.nominal else 1.0, 0.0, 0.0)
    # The first step is on relative errors, which needs no guess to start from.
    factors = _solve([[t / s for t in row] for row, s in zip(terms, times, strict=True)], [1.0] * len(times), least)
    loss = _loss(terms, times, factors)
    for _ in range(STEPS):
        now = [_dot(row, factors) for row in terms]
        scaled = [[t / n for t in row] for row, n in zip(terms, now, strict=True)]
        wanted = [1 + math.log(s / n) for s, n in zip(times, now, strict=True)]
        target = _solve(scaled, wanted, least)
        for share in (1.0, 0.5, 0.25, 0.125, 0.0625):
            nearer = [f + share * (t - f) for f, t in zip(factors, target, strict=True)]
            if _loss(terms, times, nearer) < loss * (1 - 1e-9) - 1e-15:
                break
        else:
            break
        factors, loss = nearer, _loss(terms, times, nearer)
    return Overheads(1 / factors[0], factors[1], factors[2])


def _terms(one: Observed, device: Device) -> list[float]:
    output = one.cell.output
    return [physics.roof_s(one.shape, one.cell, device), float(output * len(one.shape.blocks)), float(output)]


def _loss(terms: Sequence[Sequence[float]], times: Sequence[float], factors: Sequence[float]) -> float:
    return math.fsum(
        math.log(_dot(row, factors) / time) ** 2 if _dot(row, factors) > 0 else math.inf
        for row, time in zip(terms, times, strict=True)
    )


def _dot(row: Sequence[float], factors: Sequence[float]) -> float:
    return math.fsum(a * b for a, b in zip(row, factors, strict=True))


def _solve(rows: Sequence[Sequence[float]], wanted: Sequence[float], least: Sequence[float]) -> list[float]:
    """Return the x >= `least` that minimises |rows x - wanted|, exactly: every set of x above their least is tried.

    Of sets that do equally well, the smallest holds, earlier unknowns first.
    """
    left = [w - _dot(row, least) for row, w in zip(rows, wanted, strict=True)]
    count = len(least)
    best, best_loss = list(least), math.fsum(one * one for one in left)
    for size in range(1, count + 1):
        for free in combinations(range(count), size):
            found = _normal([[row[i] for i in free] for row in rows], left)
            if found is None or min(found) < 0:
                continue
            x = list(least)
            for i, value in zip(free, found, strict=True):
                x[i] += value
            loss = math.fsum((_dot(row, x) - w) ** 2 for row, w in zip(rows, wanted, strict=True))
            if loss < best_loss * (1 - 1e-9):
                best, best_loss = x, loss
    return best


def _normal(rows: Sequence[Sequence[float]], wanted: Sequence[float]) -> list[float] | None:
    """Solve least squares by Gram-Schmidt on columns of unit length; None where they depend on each other."""
    count = len(rows[0])
    columns = [[row[i] for row in rows] for i in range(count)]
    lengths = [math.sqrt(_dot(column, column)) for column in columns]
    if min(lengths) == 0:
        return None
    basis: list[list[float]] = []
    upper = [[0.0] * count for _ in range(count)]
    for i, column in enumerate(columns):
        rest = [value / lengths[i] for value in column]
        for j, known in enumerate(basis):
            upper[j][i] = _dot(known, rest)
            rest = [a - upper[j][i] * b for a, b in zip(rest, known, strict=True)]
        upper[i][i] = math.sqrt(_dot(rest, rest))
        if upper[i][i] < 1e-6:
            return None
        basis.append([value / upper[i][i] for value in rest])
    found = [0.0] * count
    for i in reversed(range(count)):
        found[i] = (_dot(basis[i], wanted) - math.fsum(upper[i][j] * found[j] for j in range(i + 1, count))) / upper[i][
            i
        ]
    return [value / length for value, length in zip(found, lengths, strict=True)]
