"""What `compare` looks at, as rows of data: how a metric is read from a row, and which way is worse."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import msgspec

from bench import timing
from bench.measurement import Measurement
from bench.telemetry import fields


class Metric(msgspec.Struct, frozen=True):
    """One metric. `value` reads it from a row, None where the row lacks it; `unit` as in `report.quantities`.

    `better`: lower, higher, or same (any difference is worse). `exact` metrics have no noise beyond `slack`; those that
    are also `anywhere` do not depend on the machine or the software.
    """

    name: str
    unit: str
    value: Callable[[Measurement], float | None]
    better: Literal["lower", "higher", "same"] = "lower"
    exact: bool = False
    anywhere: bool = False
    slack: float = 0.0

    def worse(self, log_ratio: float) -> float:
        """Return log(head / base) turned so that worse is positive."""
        return abs(log_ratio) if self.better == "same" else -log_ratio if self.better == "higher" else log_ratio


def _latency(row: Measurement) -> float | None:
    found = timing.latency(row)
    return found and found.value


def _throughput(row: Measurement) -> float | None:
    found = timing.throughput(row) if row.cell.output else None  # a test of a foreign suite generates nothing
    return found and found.value


def _first_token(row: Measurement) -> float | None:
    found = timing.first_token(row)
    return found and found.value


def _operations(row: Measurement) -> float | None:
    counted = row.bounds and row.bounds.ops_per_token
    return math.fsum(counted.values()) if counted else None


def _energy(row: Measurement) -> float | None:
    """Gross joules a token, where the telemetry pass could tell."""
    value = row.telemetry.get(fields.ENERGY)
    return float(value) if isinstance(value, int | float) and value > 0 else None


def _elsewhere(row: Measurement) -> float | None:
    """For metrics that no single measurement row holds."""
    return None


ENERGY = Metric("energy", "J/token", _energy)
LATENCY = Metric("latency", "s", _latency)
METRICS = (
    LATENCY,
    Metric("throughput", "tokens/s", _throughput, "higher"),
    Metric("first-token", "s", _first_token),
    Metric("per-token", "s", timing.per_token),
    ENERGY,
    Metric("parameters", "parameters", lambda row: row.parameters, exact=True, anywhere=True),
    Metric("decode-bytes", "bytes", lambda row: row.bounds and row.bounds.decode_bytes, exact=True, anywhere=True),
    Metric("analytic-memory", "bytes", lambda row: row.memory.analytic, exact=True, anywhere=True),
    Metric("tokens", "integer", lambda row: row.tokens, "same", exact=True, anywhere=True),
    Metric("ops-per-token", "number", _operations, exact=True),
    Metric("peak-memory", "bytes", lambda row: row.memory.allocated, exact=True, slack=float(2 << 20)),
)
SPEED_UP = Metric("speed-up", "ratio", _elsewhere, "higher")
LARGEST_BATCH = Metric("largest-batch", "integer", _elsewhere, "higher", exact=True)
OUTCOME = Metric("outcome", "text", _elsewhere, exact=True, anywhere=True)

BY_NAME = {metric.name: metric for metric in (*METRICS, SPEED_UP, LARGEST_BATCH)}
