"""How long a device works in a piece of code, by the profiler: what its launches hide when they take longer.

The profiler slows the host down, not the kernels. So their seconds are set against a step that was timed without it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile


def seconds(work: Callable[[], object], device: str) -> float | None:
    """Return the seconds that kernels of `work` run on a CUDA device, copies included.

    None where the profiler saw no kernel (its library is missing).
    """
    torch.cuda.synchronize(device)
    with profile(activities=[ProfilerActivity.CUDA]) as traced:
        work()
        torch.cuda.synchronize(device)
    return total(traced.key_averages())


def total(averages: Iterable[Any]) -> float | None:
    """Return the device's seconds in a profile, None where it has none. The profiler counts microseconds."""
    spent = sum(one.self_device_time_total for one in averages) / 1e6
    return spent or None
