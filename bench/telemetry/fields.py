"""What a row says of its telemetry: one flat set of fields, the same in every row. Pure.

Every field of a row that was sampled is there; one that cannot be told is null, and `reasons` says why: under the
field's name, or under "*" for all null fields that are not named. Units are in the names, shares are 0-1.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import msgspec

ENERGY = "joules_per_token"
THROTTLE = "throttle_reasons"
REASONS = "reasons"
OTHERS = "*"
# A row's line has 8 KiB, most of it for samples.
LARGEST_BYTES = 1600
_LONGEST_REASON = 120

FIELDS: dict[str, str] = {
    # The window.
    "window_s": "seconds in which the cell was called again and again for the sampler",
    "readings": "readings of the sampler in it",
    "calls": "generations in it",
    "tokens": "new tokens in it",
    "sampler_cpu_share": "CPU seconds of the sampler per second of the window",
    # The device.
    "nvml_busy": "mean share of time in which any kernel ran, as NVML rates it; one busy SM reads as 1",
    "nvml_busy_max": "highest reading of it",
    "ring_busy": "the same, from the driver's own timestamped samples",
    "ring_memory_busy": "share of time in which memory was read or written, from the driver's samples",
    "power_w": "mean power of the board",
    "power_max_w": "highest reading of it",
    "power_source": "where the mean power comes from: energy counter, ring, instant, usage",
    "energy_j": "energy of the window, by the total-energy counter",
    "energy_disagreement": "power integrated over the window against the counter, relative",
    "idle_power_w": "mean power before the sweep's first child, the device idle",
    ENERGY: "energy_j / tokens",
    "joules_per_token_net": "the same without idle power",
    "sm_clock_mhz": "median SM clock",
    "sm_clock_min_mhz": "lowest reading of it",
    "memory_clock_mhz": "median memory clock",
    "temperature_c": "highest reading",
    THROTTLE: "why clocks were lowered while the cell was timed or sampled, as a list of names",
    "power_violation_s": "seconds below the wanted clocks for power, while the cell was timed",
    "thermal_violation_s": "the same for heat",
    "device_used_bytes": "highest reading of the memory in use on the device, by all",
    "gpm_sm": "mean share of SMs that were busy, by performance counters",
    "gpm_tensor": "mean share of cycles in which tensor cores were busy",
    "gpm_dram": "mean share of the memory's bandwidth in use",
    # The host.
    "cpu_cores": "CPU seconds of the measured process per second",
    "host_busy": "share of the host's CPU time in use, by all processes",
    "host_busy_max": "the same over the busiest stretch of half a second or more between two readings",
    "rss_bytes": "highest reading of the measured process's resident memory",
    "cpu_mhz": "mean clock of the host's cores",
    # What to know before reading the rest, such as power-capped.
    "flags": "what to know of the row: power-capped, energy-disagrees",
}


def row(values: Mapping[str, Any], reasons: Mapping[str, str], others: str) -> dict[str, Any]:
    """Return a row's telemetry: every field, null where `values` lacks it, for its reason or else for `others`."""
    assert not values.keys() - FIELDS.keys(), f"unknown fields {values.keys() - FIELDS.keys()}"
    found = {name: _rounded(values.get(name)) for name in FIELDS}
    null = {name: reasons.get(name, others) for name, value in found.items() if value is None}
    # What holds for most of the null fields is said once: a line has 8 KiB.
    common = Counter(null.values()).most_common(1)
    said = {OTHERS: common[0][0]} if common else {}
    said |= {name: reason for name, reason in null.items() if reason != said.get(OTHERS)}
    longest = _LONGEST_REASON
    while True:
        found[REASONS] = {name: reason[:longest] for name, reason in said.items()}
        if len(msgspec.json.encode(found)) <= LARGEST_BYTES or longest < 8:
            return found
        longest //= 2


def absent(reason: str) -> dict[str, Any]:
    """Return telemetry without any value, for one reason."""
    return row({"flags": []}, {}, reason)


def reason(telemetry: Mapping[str, Any], name: str) -> str | None:
    """Return why a field of a row's telemetry is null; None where it is not, or where nothing was sampled."""
    if telemetry.get(name) is not None:
        return None
    said = telemetry.get(REASONS) or {}
    return said.get(name, said.get(OTHERS))


def explained(telemetry: Mapping[str, Any]) -> dict[str, str]:
    """Return the reason of every null field by its name."""
    return {name: reason(telemetry, name) or "" for name in FIELDS if telemetry.get(name) is None}


def _rounded(value: Any) -> Any:
    """Six digits: a counter is not more exact, and a row is short."""
    return float(f"{value:.6g}") if isinstance(value, float) else value
