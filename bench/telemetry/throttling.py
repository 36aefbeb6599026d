"""Why a device lowered its clocks, in names, and what follows for a row. Pure: the one place that decides it.

A power cap is a device's normal state under load: such a row is tagged and stands. Heat and what hardware does to
protect itself come and go: such a row is measured once more, and marked unstable where they are there again.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from bench.telemetry.fields import THROTTLE

# Bits of nvmlDeviceGetCurrentClocksEventReasons (until driver 535: ...ThrottleReasons), as nvml.h numbers them.
IDLE, SETTING, DISPLAY = 1, 2, 256
NAMES = {
    4: "sw_power_cap",
    8: "hw_slowdown",
    16: "sync_boost",
    32: "sw_thermal_slowdown",
    64: "hw_thermal_slowdown",
    128: "hw_power_brake_slowdown",
    512: "board_limit",
    1024: "reliability",
}
# Idle between two calls, or clocks that somebody chose: nothing that happened to the device.
_ORDINARY = IDLE | SETTING | DISPLAY

THERMAL_VIOLATION, POWER_VIOLATION = "thermal_violation", "power_violation"
SPOILING = frozenset(
    ("sw_thermal_slowdown", "hw_slowdown", "hw_thermal_slowdown", "hw_power_brake_slowdown", THERMAL_VIOLATION)
)
CAPPING = frozenset(("sw_power_cap", POWER_VIOLATION))
POWER_CAPPED = "power-capped"
# Violation counters tick for single milliseconds on a healthy device.
NOTABLE_SHARE = 0.01


def names(bits: int) -> frozenset[str]:
    """Return what the bits of a reading say; a bit that is not known yet stands as its number."""
    left = bits & ~_ORDINARY
    return frozenset(NAMES.get(1 << place, f"bit_{place}") for place in range(left.bit_length()) if left >> place & 1)


def violations(power_s: float | None, thermal_s: float | None, window_s: float) -> frozenset[str]:
    """Return what violation counters say that rose by so many seconds in a window of `window_s`."""
    pairs = ((POWER_VIOLATION, power_s), (THERMAL_VIOLATION, thermal_s))
    return frozenset(name for name, spent in pairs if spent is not None and spent > NOTABLE_SHARE * window_s)


def flags(reasons: Iterable[str]) -> list[str]:
    """Return how a row with these reasons is tagged."""
    return [POWER_CAPPED] if CAPPING & set(reasons) else []


def spoiled(telemetry: Mapping[str, Any]) -> str | None:
    """Return why a row with this telemetry must be measured again; None where nothing speaks against it."""
    found: Any = telemetry.get(THROTTLE)
    said = [str(one) for one in found] if isinstance(found, list | tuple) else []
    return next((one for one in said if one in SPOILING), None)
