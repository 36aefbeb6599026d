"""The machine at hand: which device a sweep runs on, how many threads, and the fingerprint that its rows refer to.

Imports no torch: versions come from package metadata, devices from NVML and the kernel. What must be equal for times
to be compared is in the fingerprint; what merely helps to understand them is in the facts.
"""

from __future__ import annotations

import os
import platform
import re
import subprocess
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import msgspec

from bench import budget, devices, noise, nvml, peaks
from bench.devices import Device
from bench.measurement import Environment, environment
from shortllama.errors import InputError

THREADS_VARIABLE = "OMP_NUM_THREADS"
# A thread that spins while it waits starves its neighbour on a busy machine: one step took 58 times as long.
WAIT_VARIABLE, WAIT_POLICY = "OMP_WAIT_POLICY", "passive"
# Makes CUDA count devices as NVML does.
ORDER_VARIABLE, ORDER = "CUDA_DEVICE_ORDER", "PCI_BUS_ID"

# Variables that change kernels, allocators or threads: part of the fingerprint where they are set.
_VARIABLES = (
    "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "CUDA_LAUNCH_BLOCKING", "NVIDIA_TF32_OVERRIDE",
    "ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "MKL_NUM_THREADS", "KMP_AFFINITY", "KMP_BLOCKTIME",
    "GOMP_CPU_AFFINITY", "OMP_PROC_BIND", "OMP_PLACES", "LD_PRELOAD", "MALLOC_ARENA_MAX", "MALLOC_CONF",
    "GLIBC_TUNABLES",
)  # fmt: skip
# Libraries whose versions must be equal for times to be compared.
PACKAGES = ("torch", "transformers", "safetensors")


class Machine(msgspec.Struct, frozen=True):
    """Where a sweep runs. `place`: torch's name of the device, or the table's short name of a simulated one.

    `device`: the row of the device table that predictions use; of a device that the table lacks, a nominal one of its
    memory, without rates: memory is predicted for it, times are not.
    """

    kind: Literal["cpu", "cuda", "simulated"]
    place: str
    name: str
    device: Device
    index: int = 0

    @property
    def slug(self) -> str:
        """A short name for folders."""
        return slug(self.device.short if self.kind == "simulated" else self.name)


def slug(name: str) -> str:
    """Return a device name as part of a file name: lower case, digits and dashes, at most 32 characters."""
    plain = re.sub(r"\((?:R|TM|C)\)|@.*|\bCPU\b|\bNVIDIA\b|\bProcessor\b|\d+-Core", " ", name, flags=re.IGNORECASE)
    return re.sub(r"[^a-z0-9]+", "-", plain.lower()).strip("-")[:32].strip("-") or "unknown"


def machine(name: str | None) -> Machine:
    """Return the machine that --device names: cpu, cuda[:N], a simulated device; None = CUDA where there is one.

    Raises InputError for a name that is none of these, and where there is no such CUDA device.
    """
    if name is None:
        found = nvml.devices()
        return _cuda(0, found) if found and _torch_has_cuda() else machine("cpu")
    if name == "cpu":
        return Machine("cpu", "cpu", cpu_name(), devices.lookup("cpu"))
    match = re.fullmatch(r"cuda(?::(\d+))?", name)
    if match:
        return _cuda(int(match.group(1) or 0), nvml.devices())
    device = devices.lookup(name)
    return Machine("simulated", device.short, device.name, device)


def _cuda(index: int, found: list[dict[str, Any]]) -> Machine:
    if index >= len(found):
        count = f"{len(found)} CUDA device{'s' * (len(found) != 1)}"
        known = ", ".join(devices.names())
        raise InputError(f"device cuda:{index}: this machine shows {count}; use cpu, or simulate one of {known}")
    if not _torch_has_cuda():
        raise InputError(f"device cuda:{index}: torch {_version('torch')} is built without CUDA; install a CUDA build")
    name, memory = found[index]["name"], found[index]["memory_bytes"]
    known = devices.match(name) or Device(slug(name), name, memory, 0.0, {}, nominal=True)
    device = msgspec.structs.replace(known, memory_bytes=memory)  # what the driver gives is what there is
    return Machine("cuda", f"cuda:{index}", name, device, index)


def _torch_has_cuda() -> bool:
    return "+cpu" not in _version("torch")


def cpu_name() -> str:
    """Return the processor's name as the kernel gives it, else the architecture."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        text = ""
    match = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return match.group(1).strip() if match else platform.machine()


# -- threads ----------------------------------------------------------------------------------------------------------


def threads() -> int:
    """Return the compute threads of a measuring process: OMP_NUM_THREADS where it is set, else the cores we may use.

    Cores, not hardware threads, of those the affinity mask allows; no more than the control group's share of time.
    """
    given = os.environ.get(THREADS_VARIABLE)
    if given:
        if not given.isdigit() or int(given) < 1:
            raise InputError(f"{THREADS_VARIABLE}={given!r} is not a number of threads; give 1 or more, or unset it")
        return int(given)
    return max(1, min(len({_core(cpu) for cpu in os.sched_getaffinity(0)}), _quota()))


def _core(cpu: int) -> str:
    """What tells a physical core from another; the logical one's own number where the kernel does not say."""
    try:
        return Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list").read_text()
    except OSError:
        return str(cpu)


def _quota() -> int:
    """The control group's share of CPU time, in whole cores; a large number where there is no limit."""
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
    except (OSError, ValueError):
        return 1 << 16
    return 1 << 16 if quota == "max" else max(1, int(quota) // int(period))


def child_variables(count: int) -> dict[str, str]:
    """Return the environment variables that measuring processes need before they load torch."""
    order = {} if ORDER_VARIABLE in os.environ else {ORDER_VARIABLE: ORDER}
    return {WAIT_VARIABLE: WAIT_POLICY, THREADS_VARIABLE: str(count), **order}


# -- fingerprints -----------------------------------------------------------------------------------------------------


def measured(on: Machine, count: int) -> Environment:
    """Return the environment of rows measured on a real device with `count` compute threads."""
    fingerprint: dict[str, Any] = {
        "simulated": False,
        "device": on.name,
        "kind": on.kind,
        "processor": cpu_name(),
        "architecture": platform.machine(),
        "threads": count,
        "affinity": len(os.sched_getaffinity(0)),
        "wait_policy": WAIT_POLICY,
        "python": ".".join(platform.python_version_tuple()[:2]),
        "variables": {name: os.environ[name] for name in _VARIABLES if name in os.environ},
        **{name: _version(name) for name in PACKAGES},
    }
    if on.kind == "cuda":
        fingerprint |= {key: value for key, value in nvml.devices()[on.index].items() if key != "name"}
    else:
        # In whole GiB: what the kernel keeps for itself differs by a little from boot to boot.
        fingerprint |= {"memory_gib": round(devices.host_memory_bytes() / (1 << 30)), "memory_pass": budget.METHOD}
    found = environment(fingerprint, _facts())
    return msgspec.structs.replace(found, facts=found.facts | noise.facts(found.id) | peaks.facts(found.id))


def simulated(device: Device, script: Any) -> Environment:
    """Return the environment of simulated rows: the device's figures, and what was scripted to go wrong."""
    values = {"figures": msgspec.to_builtins(device), "script": msgspec.to_builtins(script)}
    return environment({"simulated": True, "device": device.name, "kind": "simulated", **values}, _facts())


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "absent"


def _facts() -> dict[str, Any]:
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "load": round(os.getloadavg()[0], 2),
        "kernel": platform.release(),
        "shortllama": _version("shortllama"),
        "commit": _commit(),
    }


def _commit() -> str | None:
    """The commit of this source tree, marked where files differ from it; None outside a repository."""
    try:
        done = subprocess.run(
            ["git", "--no-optional-locks", "describe", "--always", "--dirty", "--abbrev=12"],
            cwd=Path(__file__).parent, capture_output=True, text=True, timeout=10, check=True,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None


def differences(before: Environment, now: Environment) -> str:
    """Return what differs between two fingerprints, as one line of `key: old -> new`."""
    keys = sorted(before.fingerprint.keys() | now.fingerprint.keys())
    pairs = ((key, before.fingerprint.get(key), now.fingerprint.get(key)) for key in keys)
    return ", ".join(f"{key}: {old} -> {new}" for key, old, new in pairs if old != new)
