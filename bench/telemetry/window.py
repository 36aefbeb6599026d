"""From the readings of one window to what a row says of it, each field or the reason why there is none. Pure."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from statistics import fmean, median
from typing import Any

from bench.telemetry import energy, throttling
from bench.telemetry.fields import ENERGY, REASONS, THROTTLE, explained, row
from bench.telemetry.readings import Cut, Invalid, Loop, Window

DISAGREEMENT = 0.05
DISAGREES = "energy-disagrees"
# NVML rates utilisation over up to a second: readings of the window's first second speak of before.
RATED_S = 1.0
# A host counts its time in hundredths of a second: over less than this, a share is coarse.
STRETCH_S = 0.5

_TIMED = ("power_violation_s", "thermal_violation_s")
_Questions = dict[str, Callable[[], Any]]


def summarise(window: Window, loop: Loop | None, idle_w: float | str) -> dict[str, Any]:
    """Return the row's telemetry of a window; without a loop, what holds of any window (no tokens, no process).

    `idle_w`: mean power of the idle device, watts, or why it is not known.
    """
    cut = Cut(window, loop)
    values: dict[str, Any] = {"window_s": cut.seconds, "readings": len(cut.readings)}
    reasons: dict[str, str] = {}
    for name, ask in {**_common(cut, loop), **_device(cut), **_energy(cut, loop, idle_w), **_host(cut, loop)}.items():
        try:
            values[name] = ask()
        except Invalid as error:
            reasons[name] = str(error)
    try:
        values[THROTTLE] = _throttle(window, values.get("power_violation_s"), values.get("thermal_violation_s"))
    except Invalid as error:
        reasons[THROTTLE] = str(error)
    disagrees = (values.get("energy_disagreement") or 0.0) > DISAGREEMENT
    values["flags"] = throttling.flags(values.get(THROTTLE) or ()) + [DISAGREES] * disagrees
    return row(values, reasons, window.no_device)


def merged(timed: Mapping[str, Any], sampled: Mapping[str, Any]) -> dict[str, Any]:
    """Return a row's telemetry from the edges of its timing pass and from its telemetry pass.

    Violations are those of the timing pass, what throttled is what did in either; all else was sampled.
    """
    values = {name: value for name, value in sampled.items() if name != REASONS and value is not None}
    values |= {name: timed[name] for name in _TIMED if timed.get(name) is not None}
    said = [one[THROTTLE] for one in (timed, sampled) if one.get(THROTTLE) is not None]
    if said:
        values[THROTTLE] = sorted({name for one in said for name in one})
        others = [one for one in values.get("flags", ()) if one != throttling.POWER_CAPPED]
        values["flags"] = throttling.flags(values[THROTTLE]) + others
    return row(values, explained(sampled), "")


# -- each field, and how it is told -----------------------------------------------------------------------------------


def _common(cut: Cut, loop: Loop | None) -> _Questions:
    def of_loop(name: str) -> Any:
        if loop is None:
            raise Invalid("no cell was called for the sampler")
        return getattr(loop, name)

    return {
        "calls": lambda: of_loop("calls"),
        "tokens": lambda: of_loop("tokens"),
        "sampler_cpu_share": lambda: _share(cut.window.cpu_s, cut.window.span_s),
    }


def _device(cut: Cut) -> _Questions:
    return {
        "nvml_busy": lambda: fmean(cut.values("busy", RATED_S)),
        "nvml_busy_max": lambda: max(cut.values("busy", RATED_S)),
        "ring_busy": lambda: fmean(value for _, value in cut.ring("busy")),
        "ring_memory_busy": lambda: fmean(value for _, value in cut.ring("memory_busy")),
        "sm_clock_mhz": lambda: median(cut.values("sm_clock_mhz")),
        "sm_clock_min_mhz": lambda: min(cut.values("sm_clock_mhz")),
        "memory_clock_mhz": lambda: median(cut.values("memory_clock_mhz")),
        "temperature_c": lambda: max(cut.values("temperature_c")),
        "power_violation_s": lambda: cut.rise("power_violation_s"),
        "thermal_violation_s": lambda: cut.rise("thermal_violation_s"),
        "device_used_bytes": lambda: int(max(cut.values("device_used_bytes"))),
        "gpm_sm": lambda: cut.gpm("gpm_sm"),
        "gpm_tensor": lambda: cut.gpm("gpm_tensor"),
        "gpm_dram": lambda: cut.gpm("gpm_dram"),
    }


def _energy(cut: Cut, loop: Loop | None, idle_w: float | str) -> _Questions:
    def mean() -> tuple[float, str]:
        try:
            return energy.watts(cut), energy.COUNTER
        except Invalid:
            found = energy.power(cut)
            return found.mean_w, found.source

    def idle() -> float:
        if isinstance(idle_w, str):
            raise Invalid(idle_w)
        return idle_w

    def each(watts: float) -> float:
        if not loop or not loop.tokens:
            raise Invalid("no tokens were made in the window")
        return watts * cut.seconds / loop.tokens

    return {
        "power_w": lambda: mean()[0],
        "power_source": lambda: mean()[1],
        "power_max_w": lambda: energy.power(cut).most_w,
        "energy_j": lambda: energy.watts(cut) * cut.seconds,
        "energy_disagreement": lambda: abs(energy.power(cut).mean_w / energy.watts(cut) - 1),
        "idle_power_w": idle,
        ENERGY: lambda: each(energy.watts(cut)),
        "joules_per_token_net": lambda: each(energy.above_idle(energy.watts(cut), idle_w)),
    }


def _host(cut: Cut, loop: Loop | None) -> _Questions:
    def process(name: str) -> list[tuple[float, float]]:
        if loop is None:
            raise Invalid("no cell was called for the sampler")
        return cut.series(name)

    def cores() -> float:
        pairs = process("cpu_s")
        return _share(pairs[-1][1] - pairs[0][1], pairs[-1][0] - pairs[0][0])

    return {
        "cpu_cores": cores,
        "host_busy": lambda: _share(cut.rise("host_busy_s"), cut.rise("host_s")),
        "host_busy_max": lambda: _busiest(cut),
        "rss_bytes": lambda: int(max(value for _, value in process("rss_bytes"))),
        "cpu_mhz": lambda: fmean(cut.values("cpu_mhz")),
    }


def _busiest(cut: Cut) -> float:
    """Return the largest share of any stretch of STRETCH_S or more; with one alone that is the mean, and no peak."""
    for name in ("host_busy_s", "host_s"):
        cut.rise(name)  # raises where either counter cannot be told
    counted = [one for one in cut.window.readings if {"host_busy_s", "host_s"} <= one.values.keys()]
    shares: list[float] = []
    before = counted[0]
    for after in counted[1:]:
        if after.at_s - before.at_s >= STRETCH_S:
            rise = {name: after.values[name] - before.values[name] for name in ("host_busy_s", "host_s")}
            shares.append(_share(rise["host_busy_s"], rise["host_s"]))
            before = after
    if len(shares) < 2:
        raise Invalid(f"the window has no two stretches of {STRETCH_S:g} s between readings")
    return max(shares)


def _share(part: float, whole: float) -> float:
    if whole <= 0:
        raise Invalid("the two readings are of one time")
    return part / whole


def _throttle(window: Window, power_s: float | None, thermal_s: float | None) -> list[str]:
    """Names of what lowered the clocks at any reading, and of violations that rose between the edges."""
    readings = window.readings
    seen = [int(one.values["events"]) for one in readings if "events" in one.values]
    if not seen and thermal_s is None:
        missing = next((one.missing["events"] for one in readings if "events" in one.missing), "")
        raise Invalid(missing or window.no_device or "was not read in the window")
    said = throttling.violations(power_s, thermal_s, window.span_s).union(*map(throttling.names, seen))
    return sorted(said)
