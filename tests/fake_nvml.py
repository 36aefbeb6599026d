"""NVML as a driver would play it, by a script: the functions that this project calls, on a clock that a test holds.

`Fake(...)` stands for the module `pynvml`. Its device draws `power_w`, is busy for the share `busy`, counts energy and
violations, keeps a ring of samples that are overwritten, and refuses or lacks what the script says.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

MESSAGES = {
    1: "Uninitialized",
    3: "Not Supported",
    4: "Insufficient Permissions",
    6: "Not Found",
    9: "Driver Not Loaded",
    12: "NVML Shared Library Not Found",
    13: "Function Not Found",
    15: "GPU is lost",
    999: "Unknown Error",
}
UUID, PART = "GPU-5a", "MIG-7f"
# Every device function that needs a whole device: a part of one (MIG) answers none of them.
WHOLE = (
    "nvmlDeviceGetUtilizationRates", "nvmlDeviceGetPowerUsage", "nvmlDeviceGetFieldValues",
    "nvmlDeviceGetTotalEnergyConsumption", "nvmlDeviceGetClockInfo", "nvmlDeviceGetTemperature",
    "nvmlDeviceGetCurrentClocksEventReasons", "nvmlDeviceGetViolationStatus", "nvmlDeviceGetSamples",
    "nvmlGpmSampleGet",
)  # fmt: skip


class Refused(Exception):
    """As pynvml.NVMLError: carries a code."""

    def __init__(self, value: int) -> None:
        super().__init__(MESSAGES.get(value, f"error {value}"))
        self.value = value


class Fake(ModuleType):
    """The module. Every question of a device goes through `_ask`, which knows what the script forbids."""

    NVMLError = Refused
    NVML_ERROR_UNINITIALIZED, NVML_ERROR_NOT_SUPPORTED, NVML_ERROR_NOT_FOUND = 1, 3, 6
    NVML_ERROR_DRIVER_NOT_LOADED, NVML_ERROR_LIBRARY_NOT_FOUND, NVML_ERROR_FUNCTION_NOT_FOUND = 9, 12, 13
    NVML_CLOCK_SM, NVML_CLOCK_MEM, NVML_TEMPERATURE_GPU = 1, 2, 0
    NVML_TOTAL_POWER_SAMPLES, NVML_GPU_UTILIZATION_SAMPLES, NVML_MEMORY_UTILIZATION_SAMPLES = 0, 1, 2
    NVML_PERF_POLICY_POWER, NVML_PERF_POLICY_THERMAL = 0, 1
    NVML_FI_DEV_POWER_INSTANT = 186
    NVML_GPM_METRIC_SM_UTIL, NVML_GPM_METRIC_ANY_TENSOR_UTIL, NVML_GPM_METRIC_DRAM_BW_UTIL = 2, 5, 10
    NVML_GPM_METRICS_GET_VERSION = 1

    def __init__(
        self,
        *,
        init: int = 0,
        mute: tuple[str, ...] = (),
        refuse: dict[str, int] | None = None,
        lacks: tuple[str, ...] = (),
        pids: tuple[int, ...] = (),
        lost_at: float | None = None,
        back_at: float | None = None,
        clock: Callable[[], float] = time.time,
        power_w: float = 400.0,
        counted: float = 1.0,
        step_s: float = 0.1,
        busy: float = 0.9,
        ring: tuple[float, int] = (0.16, 120),
        events: int = 0,
        violated: tuple[float, float] = (0.0, 0.0),
        hopper: bool = True,
        gpm: dict[int, float] | None = None,
        part: bool = False,
        uuid: str = UUID,
    ) -> None:
        """`mute`: functions that answer Not Supported, `refuse`: those that answer a code, `lacks`: names that this
        binding does not have; `lost_at`, `back_at`: when the device is lost, when its counters start anew; `counted`:
        what the energy counter sees of the power, in steps of `step_s`; `ring`: period and size of the samples'
        buffer; `violated`: seconds a second of (power, thermal); `part`: a part of a device (MIG)."""
        super().__init__("pynvml")
        self._init, self._pids, self.open, self.asked = init, pids, 0, 0
        self._refuse = dict.fromkeys(mute, 3) | (refuse or {}) | (dict.fromkeys(WHOLE, 3) if part else {})
        self._lacks = lacks
        self._lost_at, self._back_at, self._clock = lost_at, back_at, clock
        self._start = clock()
        self._power_w, self._counted, self._step_s, self._busy, self._ring = power_w, counted, step_s, busy, ring
        self._events, self._violated, self._hopper, self._part = events, violated, hopper, part
        self._gpm = {2: 80.0, 5: 30.0, 10: 60.0} if gpm is None else gpm
        self._uuid = uuid

    def __getattribute__(self, name: str) -> Any:
        if not name.startswith("_") and name in self._lacks:
            raise AttributeError(f"module 'pynvml' has no attribute {name!r}", name=name)
        return super().__getattribute__(name)

    def __getattr__(self, name: str) -> Any:
        has = name.startswith("nvml") and name not in self._lacks
        answer = getattr(type(self), f"_{name}", None) if has else None
        if answer is None:
            raise AttributeError(f"module 'pynvml' has no attribute {name!r}", name=name)

        def asked(*arguments: Any) -> Any:
            self.asked += 1
            if name in self._refuse:
                raise Refused(self._refuse[name])
            if self._lost_at is not None and self._clock() >= self._lost_at and name != "nvmlDeviceGetCount":
                raise Refused(15)
            return answer(self, *arguments)

        return asked

    def nvmlInit(self) -> None:
        if self._init:
            raise Refused(self._init)
        self.open += 1

    def nvmlShutdown(self) -> None:
        self.open -= 1

    # -- what there is ------------------------------------------------------------------------------------------------

    def _nvmlDeviceGetCount(self) -> int:
        return 2

    def _nvmlSystemGetDriverVersion(self) -> str:
        return "580.65"

    def _nvmlDeviceGetHandleByIndex(self, index: int) -> str:
        return "by index"

    def _nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        if uuid not in (self._uuid, "GPU-ab"):
            raise Refused(6)
        return "by uuid"

    def _nvmlDeviceGetUUID(self, handle: str) -> str:
        return PART if self._part else self._uuid

    def _nvmlDeviceGetName(self, handle: str) -> str:
        return "NVIDIA H100 80GB HBM3"

    def _nvmlDeviceGetMemoryInfo(self, handle: str) -> Any:
        return SimpleNamespace(total=80 << 30, used=3 << 30)

    def _nvmlDeviceGetEnforcedPowerLimit(self, handle: str) -> int:
        return 700_000

    def _nvmlDeviceGetMaxClockInfo(self, handle: str, kind: int) -> int:
        return 1980

    def _nvmlDeviceGetMigMode(self, handle: str) -> list[int]:
        return [int(self._part)] * 2

    def _nvmlDeviceGetComputeRunningProcesses(self, handle: str) -> list[Any]:
        return [SimpleNamespace(pid=pid) for pid in self._pids]

    # -- what it does -------------------------------------------------------------------------------------------------

    def _since(self) -> float:
        """Seconds that the counters have counted."""
        now = self._clock()
        return now - (self._back_at if self._back_at is not None and now >= self._back_at else self._start)

    def _nvmlDeviceGetUtilizationRates(self, handle: str) -> Any:
        return SimpleNamespace(gpu=round(100 * self._busy), memory=40)

    def _nvmlDeviceGetPowerUsage(self, handle: str) -> int:
        return round(1000 * self._power_w) - 1000  # tells this source from the others

    def _nvmlDeviceGetFieldValues(self, handle: str, fields: list[int]) -> list[Any]:
        assert fields == [186]
        return [SimpleNamespace(nvmlReturn=0, value=SimpleNamespace(uiVal=round(1000 * self._power_w)))]

    def _nvmlDeviceGetTotalEnergyConsumption(self, handle: str) -> int:
        steps = int(self._since() / self._step_s)
        return round(1000 * (self._power_w * self._counted * steps * self._step_s + 5e6 * (self._back_at is None)))

    def _nvmlDeviceGetClockInfo(self, handle: str, kind: int) -> int:
        return 1755 if kind == 1 else 2619

    def _nvmlDeviceGetTemperature(self, handle: str, sensor: int) -> int:
        return 61

    def _nvmlDeviceGetCurrentClocksEventReasons(self, handle: str) -> int:
        return self._events

    def _nvmlDeviceGetCurrentClocksThrottleReasons(self, handle: str) -> int:
        return self._events

    def _nvmlDeviceGetViolationStatus(self, handle: str, policy: int) -> Any:
        return SimpleNamespace(violationTime=int(1e9 * self._violated[policy] * self._since()))

    def _nvmlDeviceGetSamples(self, handle: str, kind: int, seen_us: int) -> tuple[int, list[Any]]:
        """The ring as the driver holds it: the newest samples overwrite the oldest wherever they stand."""
        period, size = self._ring
        last = int(self._clock() / period)
        kept = range(max(0, last - size + 1), last + 1)
        slots = sorted(kept, key=lambda number: number % size)
        value = {0: round(1000 * self._power_w) + 1000, 1: round(100 * self._busy), 2: 40}[kind]
        found = [
            SimpleNamespace(timeStamp=int(1e6 * number * period), sampleValue=SimpleNamespace(uiVal=value, dVal=-1.0))
            for number in slots
        ]
        if not any(one.timeStamp > seen_us for one in found):
            raise Refused(6)
        return 1, found  # 1: unsigned int

    # -- performance counters -----------------------------------------------------------------------------------------

    def _nvmlGpmQueryDeviceSupport(self, handle: str) -> Any:
        return SimpleNamespace(isSupportedDevice=int(self._hopper))

    def _nvmlGpmSampleAlloc(self) -> Any:
        return SimpleNamespace(at=None)

    def _nvmlGpmSampleGet(self, handle: str, sample: Any) -> Any:
        sample.at = self._clock()
        return sample

    def c_nvmlGpmMetricsGet_t(self) -> Any:
        return SimpleNamespace(metrics=[SimpleNamespace(nvmlReturn=0, value=None) for _ in range(8)])

    def _nvmlGpmMetricsGet(self, asked: Any) -> Any:
        assert asked.sample2.at - asked.sample1.at >= 0.1
        for one in asked.metrics[: asked.numMetrics]:
            one.value = self._gpm.get(one.metricId, 0.0)
            one.nvmlReturn = 0 if one.metricId in self._gpm else 3
        return asked
