"""The NVIDIA management library, as far as this project asks it: which devices there are, what of them is used.

NVML takes no notice of CUDA_VISIBLE_DEVICES: devices are numbered here as CUDA would number them by bus id, and their
handles found by UUID where that variable names one. Every call opens the library anew, since a driver may go away; a
question that a device does not answer is None.
"""

from __future__ import annotations

import os
from collections.abc import Generator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

from shortllama.errors import InputError


@contextmanager
def library() -> Generator[ModuleType | None]:
    """Yield pynvml, initialised; None where there is no driver. Raises InputError where there is one that refuses."""
    import pynvml

    absent = (
        pynvml.NVML_ERROR_LIBRARY_NOT_FOUND,
        pynvml.NVML_ERROR_DRIVER_NOT_LOADED,
        pynvml.NVML_ERROR_UNINITIALIZED,
    )
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        if getattr(error, "value", None) in absent:
            yield None
            return
        raise InputError(
            f"the NVIDIA driver refuses to answer (NVML: {error}); let this user read /dev/nvidia*, or use --device cpu"
        ) from None
    try:
        yield pynvml
    finally:
        pynvml.nvmlShutdown()


def devices() -> list[dict[str, Any]]:
    """Return what NVML says of the devices that CUDA would show, in CUDA's order; empty without a driver."""
    with library() as nvml:
        if nvml is None:
            return []
        try:
            return [_describe(nvml, handle(nvml, index)) for index in range(len(_visible(nvml.nvmlDeviceGetCount())))]
        except nvml.NVMLError:
            return []


def handle(nvml: ModuleType, index: int) -> Any:
    """Return the handle of CUDA's device `index`."""
    one = _visible(nvml.nvmlDeviceGetCount())[index]
    return nvml.nvmlDeviceGetHandleByIndex(int(one)) if one.isdigit() else nvml.nvmlDeviceGetHandleByUUID(one)


def handle_of(nvml: ModuleType, uuid: str) -> Any:
    """Return the handle of the device, or part of one, with this UUID."""
    return nvml.nvmlDeviceGetHandleByUUID(uuid)


def uuid_of(nvml: ModuleType, handle: Any) -> str:
    """Return the UUID of a device: GPU-..., or MIG-... of a part."""
    return str(nvml.nvmlDeviceGetUUID(handle))


def used_bytes(index: int) -> int | None:
    """Return the memory in use on CUDA's device `index`, by all processes; None where NVML does not say."""
    with library() as nvml:
        return (
            None if nvml is None else _asked(nvml, lambda: int(nvml.nvmlDeviceGetMemoryInfo(handle(nvml, index)).used))
        )


def other_processes(index: int) -> list[int] | None:
    """Return the ids of processes that compute on CUDA's device `index`, this one left out; None where NVML is mute.

    In a container, NVML may name processes by the host's ids, or none at all.
    """
    with library() as nvml:
        if nvml is None:
            return None
        found = _asked(nvml, lambda: nvml.nvmlDeviceGetComputeRunningProcesses(handle(nvml, index)))
        return None if found is None else [int(one.pid) for one in found if one.pid != os.getpid()]


def _asked(nvml: ModuleType, question: Any) -> Any:
    try:
        return question()
    except nvml.NVMLError:
        return None


def _visible(count: int) -> list[str]:
    """Indices or UUIDs that CUDA_VISIBLE_DEVICES lets through."""
    text = os.environ.get("CUDA_VISIBLE_DEVICES")
    if text is None:
        return [str(index) for index in range(count)]
    shown: list[str] = []
    for one in (part.strip() for part in text.split(",")):
        if not one or (one.lstrip("-").isdigit() and not 0 <= int(one) < count):
            break  # CUDA ignores everything from the first invalid entry on
        shown.append(one)
    return shown


def _describe(nvml: ModuleType, device: Any) -> dict[str, Any]:
    def ask(question: str, *arguments: Any) -> Any:
        return _asked(nvml, lambda: getattr(nvml, question)(device, *arguments))

    power = ask("nvmlDeviceGetEnforcedPowerLimit")
    return {
        "name": ask("nvmlDeviceGetName"),
        "memory_bytes": nvml.nvmlDeviceGetMemoryInfo(device).total,
        "driver": nvml.nvmlSystemGetDriverVersion(),
        "power_limit_w": None if power is None else power / 1e3,
        "sm_clock_limit_mhz": ask("nvmlDeviceGetMaxClockInfo", nvml.NVML_CLOCK_SM),
        "memory_clock_limit_mhz": ask("nvmlDeviceGetMaxClockInfo", nvml.NVML_CLOCK_MEM),
        "mig": (ask("nvmlDeviceGetMigMode") or [None])[0],
    }
