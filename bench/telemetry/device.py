"""Reads one NVIDIA device through NVML, by its UUID: readings, the driver's own ring of samples, performance counters.

Bindings and drivers of different age lack different functions, a device refuses some, and any may fail from one
reading to the next: each quantity answers for itself, with its value or with the reason why there is none.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from types import ModuleType
from typing import Any

from bench import nvml
from bench.telemetry.counters import Counters
from bench.telemetry.host import Read

# Kind of sample, and by what to divide it: per cent, milliwatts.
_RINGS = {
    "busy": ("NVML_GPU_UTILIZATION_SAMPLES", 100.0),
    "memory_busy": ("NVML_MEMORY_UTILIZATION_SAMPLES", 100.0),
    "power_w": ("NVML_TOTAL_POWER_SAMPLES", 1e3),
}
# Members of a sample's union by the type that NVML says, as nvml.h numbers them.
_MEMBERS = ("dVal", "uiVal", "ulVal", "ullVal", "sllVal", "siVal", "usVal")
_US = 1e6


class Device:
    """A device whose library is open; rings and counters are of the window that `begin` begins."""

    def __init__(self, library: ModuleType, handle: Any) -> None:
        self._nvml, self._handle = library, handle
        self._never: dict[str, str] = {}  # what this device, driver or binding does not have at all
        self._rings: dict[str, dict[float, float]] = {}
        self._unread: dict[str, str] = {}
        self._seen_us: dict[str, int] = {}
        self._counters = Counters(library, handle)

    def begin(self) -> None:
        """Forget what is of a window before."""
        now = time.time_ns() // 1000
        self._rings, self._unread = {name: {} for name in _RINGS}, {}
        self._seen_us = dict.fromkeys(_RINGS, now)
        self._counters.begin()

    def read(self, *, slow: bool, edge: bool = False) -> Read:
        """Return quantities, and why others could not be read; `slow` also fetches the rings, and what is rarely
        asked; an `edge` may lie outside what the child did, and is no sample of the performance counters."""
        values: dict[str, float] = {}
        missing: dict[str, str] = {}
        for name, ask in self._questions(slow).items():
            self._put(name, ask, values, missing)
        if slow:
            for name in _RINGS:
                self._fetch(name)
            if not edge:
                self._counters.sample()
        return values, missing

    def rings(self) -> dict[str, tuple[tuple[float, float], ...] | str]:
        """Return the driver's samples of this window, by monotonic seconds, or why there are none."""
        return {name: self._unread.get(name) or tuple(sorted(self._rings[name].items())) for name in _RINGS}

    def gpm(self) -> dict[str, float | str]:
        """Return the performance counters' means over this window, or why there are none."""
        return self._counters.means()

    def _questions(self, slow: bool) -> dict[str, Callable[[], float]]:
        lib, one = self._nvml, self._handle
        return {
            "busy": lambda: lib.nvmlDeviceGetUtilizationRates(one).gpu / 100,
            "power_w": lambda: lib.nvmlDeviceGetPowerUsage(one) / 1e3,
            "power_instant_w": self._instant,
            "energy_j": lambda: lib.nvmlDeviceGetTotalEnergyConsumption(one) / 1e3,
            "sm_clock_mhz": lambda: lib.nvmlDeviceGetClockInfo(one, lib.NVML_CLOCK_SM),
            "memory_clock_mhz": lambda: lib.nvmlDeviceGetClockInfo(one, lib.NVML_CLOCK_MEM),
            "temperature_c": lambda: lib.nvmlDeviceGetTemperature(one, lib.NVML_TEMPERATURE_GPU),
            "events": self._events,
            "device_used_bytes": lambda: lib.nvmlDeviceGetMemoryInfo(one).used,
        } | (
            {
                "power_violation_s": lambda: self._violation(lib.NVML_PERF_POLICY_POWER),
                "thermal_violation_s": lambda: self._violation(lib.NVML_PERF_POLICY_THERMAL),
            }
            if slow
            else {}
        )

    def _put(self, name: str, ask: Callable[[], float], values: dict[str, float], missing: dict[str, str]) -> None:
        if name in self._never:
            missing[name] = self._never[name]
            return
        try:
            values[name] = float(ask())
        except Exception as error:
            missing[name] = self._refusal(name, error)

    def _refusal(self, name: str, error: Exception) -> str:
        """Why a question failed, in words; one that can never be answered is not asked again. Raises what is none."""
        if isinstance(error, AttributeError):
            reason, final = f"this binding of NVML lacks it ({error.name})", True
        elif isinstance(error, self._nvml.NVMLError):
            code = getattr(error, "value", None)
            final = code in (self._nvml.NVML_ERROR_NOT_SUPPORTED, self._nvml.NVML_ERROR_FUNCTION_NOT_FOUND)
            reason = f"NVML: {error}"
        else:
            raise error
        if final:
            self._never[name] = reason
        return reason

    def _instant(self) -> float:
        """Power at this moment; nvmlDeviceGetPowerUsage is a mean over a second since Ampere."""
        lib = self._nvml
        (found,) = lib.nvmlDeviceGetFieldValues(self._handle, [lib.NVML_FI_DEV_POWER_INSTANT])
        if found.nvmlReturn:
            raise lib.NVMLError(found.nvmlReturn)
        return found.value.uiVal / 1e3

    def _events(self) -> float:
        """Bits of why clocks are lowered; the function was named for throttling before."""
        lib = self._nvml
        named = getattr(lib, "nvmlDeviceGetCurrentClocksEventReasons", None)
        if named is not None:
            try:
                return named(self._handle)
            except lib.NVMLError as error:
                if getattr(error, "value", None) != lib.NVML_ERROR_FUNCTION_NOT_FOUND:
                    raise
        return lib.nvmlDeviceGetCurrentClocksThrottleReasons(self._handle)

    def _violation(self, policy: int) -> float:
        return self._nvml.nvmlDeviceGetViolationStatus(self._handle, policy).violationTime / 1e9

    def _fetch(self, name: str) -> None:
        """Add the driver's samples since the last fetch. They carry the host's time of day."""
        if self._unread.get(name):
            return
        kind, unit = _RINGS[name]
        try:
            held, found = self._nvml.nvmlDeviceGetSamples(self._handle, getattr(self._nvml, kind), self._seen_us[name])
        except Exception as error:
            if getattr(error, "value", None) != self._nvml.NVML_ERROR_NOT_FOUND:  # that: no new one yet
                self._unread[name] = self._refusal(f"ring {name}", error)
            return
        if not 0 <= held < len(_MEMBERS):
            self._unread[name] = f"NVML gives samples of a type that is not known ({held})"
            return
        behind_s = time.time() - time.monotonic()
        for one in found:
            if one.timeStamp > self._seen_us[name]:  # the rest has been seen, or was never filled
                self._rings[name][one.timeStamp / _US - behind_s] = getattr(one.sampleValue, _MEMBERS[held]) / unit
        self._seen_us[name] = max([self._seen_us[name], *(one.timeStamp for one in found)])


class Devices:
    """The devices that were asked for, each opened once; `library` is NVML, open, or why there is none."""

    def __init__(self, library: ModuleType | str) -> None:
        self._library = library
        self._open: dict[tuple[int, str | None], Device] = {}

    def find(self, index: int, uuid: str | None) -> Device | str:
        """Return CUDA's device by the UUID that the measured process saw, by index where none has said it yet; or why
        there is none."""
        if isinstance(self._library, str):
            return self._library
        if (index, uuid) not in self._open:
            try:
                self._open[index, uuid] = Device(self._library, _handle(self._library, index, uuid))
            except (self._library.NVMLError, IndexError) as error:
                return f"NVML knows no device {uuid or index}: {error}"
        return self._open[index, uuid]


def _handle(library: ModuleType, index: int, uuid: str | None) -> Any:
    if uuid is None:
        return nvml.handle(library, index)
    try:
        return nvml.handle_of(library, uuid)
    except library.NVMLError:
        handle = nvml.handle(library, index)
        # A part of a device (MIG) has a UUID of its own, which CUDA may not give.
        if not nvml.uuid_of(library, handle).startswith("MIG"):
            raise
        return handle
