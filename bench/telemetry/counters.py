"""Performance counters (GPM) of a Hopper device or a later one: means over what lies between two samples."""

from __future__ import annotations

import time
from types import ModuleType
from typing import Any

# Means of less say little; NVML asks for some 0.1 s.
APART_S = 0.2
# Each in per cent.
METRICS = {
    "gpm_sm": "NVML_GPM_METRIC_SM_UTIL",
    "gpm_tensor": "NVML_GPM_METRIC_ANY_TENSOR_UTIL",
    "gpm_dram": "NVML_GPM_METRIC_DRAM_BW_UTIL",
}
_WHAT = "performance counters (GPM)"


class Counters:
    """A window's first sample and its last, in memory that is kept; `begin` starts a window."""

    def __init__(self, library: ModuleType, handle: Any) -> None:
        self._nvml, self._handle = library, handle
        self._samples: list[Any] = []
        self._at_s: list[float] = []
        self._none = self._open()  # why this device has no counters at all
        self._refused = self._none

    def _open(self) -> str:
        lib = self._nvml
        try:
            if not lib.nvmlGpmQueryDeviceSupport(self._handle).isSupportedDevice:
                return f"{_WHAT} begin with Hopper; this device has none"
            self._samples = [lib.nvmlGpmSampleAlloc() for _ in range(2)]
        except (lib.NVMLError, AttributeError) as error:
            return f"{_WHAT}: {error}"
        return ""

    def begin(self) -> None:
        """Forget what is of a window before."""
        self._at_s, self._refused = [], self._none

    def sample(self) -> None:
        """Take the window's first sample, or take its last anew."""
        if self._refused:
            return
        try:
            self._nvml.nvmlGpmSampleGet(self._handle, self._samples[min(len(self._at_s), 1)])
        except (self._nvml.NVMLError, AttributeError) as error:
            self._refused = f"{_WHAT}: {error}"
            return
        self._at_s = [*self._at_s[:1], time.monotonic()]

    def means(self) -> dict[str, float | str]:
        """Return each counter's mean between both samples as a share, or why there is none."""
        if not self._refused and (len(self._at_s) < 2 or self._at_s[1] - self._at_s[0] < APART_S):
            return dict.fromkeys(METRICS, f"{_WHAT} need two samples {APART_S:g} s apart in the window")
        if self._refused:
            return dict.fromkeys(METRICS, self._refused)
        lib = self._nvml
        try:
            asked = lib.c_nvmlGpmMetricsGet_t()
            asked.version, asked.numMetrics = lib.NVML_GPM_METRICS_GET_VERSION, len(METRICS)
            asked.sample1, asked.sample2 = self._samples
            for place, constant in enumerate(METRICS.values()):
                asked.metrics[place].metricId = getattr(lib, constant)
            lib.nvmlGpmMetricsGet(asked)
        except (lib.NVMLError, AttributeError) as error:
            return dict.fromkeys(METRICS, f"{_WHAT}: {error}")
        found = {name: asked.metrics[place] for place, name in enumerate(METRICS)}
        return {name: _metric(lib, one) for name, one in found.items()}


def _metric(lib: ModuleType, one: Any) -> float | str:
    """Per cent as a share; what is not a number is none."""
    if one.nvmlReturn:
        return f"{_WHAT}: {lib.NVMLError(one.nvmlReturn)}"
    return one.value / 100 if one.value == one.value else f"{_WHAT}: not a number"
