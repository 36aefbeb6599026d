"""Gathers what `diagnosis` decides on: from /proc, /sys, psutil, NVML, and the sampler. Reads only; takes some seconds.

Nothing here raises for what a machine does not show: such a fact is None.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import reduce
from operator import and_
from pathlib import Path
from statistics import median
from typing import Any

from bench import environment, noise, nvml, peaks
from bench.diagnosis import BUSY_SHARE, Facts, Gpu, Sampler
from bench.environment import Machine
from bench.statistics import mean_of
from bench.telemetry import client, throttling

WATCHED_S = 1.0  # shares of CPU time are taken over this long
READINGS = 5  # of the device, in this time: what is set in all of them persists
PAIRS, BLOCK_S, WORK_S = 5, 0.3, 0.02
SYSFS = Path("/sys/devices/system/cpu")


def gather(machine: Machine) -> Facts:
    """Return what can be seen of a machine. Raises InputError for OMP_NUM_THREADS that is no number."""
    threads = environment.threads()
    here = environment.measured(machine, threads)
    index = machine.index if machine.kind == "cuda" else None
    before = throttle_count(SYSFS)
    busy, stolen, swapped = _watch()
    gpu = None if index is None else _gpu(index)
    load = os.getloadavg()[0]
    sampler = _sampler(index)
    after = throttle_count(SYSFS)
    return Facts(
        kind=machine.kind,
        cores=len(os.sched_getaffinity(0)),
        threads=threads,
        load=load,
        busy=busy,
        stolen=stolen,
        swapped=swapped,
        governors=governors(SYSFS),
        boost=boost(SYSFS),
        throttled=after,
        throttled_now=None if after is None or before is None else after > before,
        wait_policy=os.environ.get(environment.WAIT_VARIABLE),
        variables=dict(here.fingerprint["variables"]),
        noise=here.facts.get(noise.BETWEEN_FACT),
        ceilings=peaks.FACT in here.facts,
        sampler=sampler,
        gpu=gpu,
    )


# -- the host ---------------------------------------------------------------------------------------------------------


def governors(root: Path) -> frozenset[str] | None:
    """Return the frequency governors of all cores; None where the kernel shows none. `root`: sysfs' folder of CPUs."""
    found = frozenset(_text(file) for file in root.glob("cpu[0-9]*/cpufreq/scaling_governor")) - {""}
    return found or None


def boost(root: Path) -> bool | None:
    """Return whether clocks above the nominal one are allowed; None where the kernel does not say."""
    disabled, enabled = _text(root / "intel_pstate" / "no_turbo"), _text(root / "cpufreq" / "boost")
    if disabled:
        return disabled == "0"
    return enabled == "1" if enabled else None


def throttle_count(root: Path) -> int | None:
    """Return how often cores or packages were too hot since the start; None where it is not counted."""
    found = [_text(file) for file in root.glob("cpu[0-9]*/thermal_throttle/*_throttle_count")]
    counts = [int(one) for one in found if one.isdigit()]
    return sum(counts) if counts else None


def _text(file: Path) -> str:
    try:
        return file.read_text().strip()
    except OSError:
        return ""


def _watch() -> tuple[dict[str, float], float | None, bool | None]:
    """Watch the host: other processes that compute, the share of time that went to other guests, and swapping."""
    import psutil

    def others() -> Iterator[Any]:
        for one in psutil.process_iter(["name"]):
            if one.pid != os.getpid():
                yield one

    known = list(others())
    before, swap = psutil.cpu_times(), psutil.swap_memory()
    for one in known:
        with contextlib.suppress(psutil.Error):
            one.cpu_percent()
    time.sleep(WATCHED_S)
    busy: dict[str, float] = {}
    for one in known:
        with contextlib.suppress(psutil.Error):
            share = one.cpu_percent() / 100
            if share > BUSY_SHARE:
                busy[f"{one.info['name']} ({one.pid})"] = share
    after, now = psutil.cpu_times(), psutil.swap_memory()
    spent = sum(after) - sum(before)
    stolen = getattr(after, "steal", None)
    share = None if stolen is None or spent <= 0 else max(0.0, stolen - before.steal) / spent
    return busy, share, (now.sin, now.sout) != (swap.sin, swap.sout)


# -- the device -------------------------------------------------------------------------------------------------------


def _gpu(index: int) -> Gpu:
    others = nvml.other_processes(index)
    with nvml.library() as library:
        if library is None:
            return Gpu(others=others)
        try:
            return gpu(library, nvml.handle(library, index), others, time.sleep)
        except (library.NVMLError, IndexError):
            return Gpu(others=others)


def gpu(library: Any, handle: Any, others: list[int] | None, sleep: Callable[[float], None]) -> Gpu:
    """Return what NVML answers of a device; each question that it refuses is None."""

    def ask(name: str, *arguments: Any) -> Any:
        try:
            return getattr(library, name)(handle, *arguments)
        except (library.NVMLError, AttributeError):  # the latter: a driver's library that is older than its bindings
            return None

    def watts(value: Any) -> float | None:
        return None if value is None else value / 1e3

    def flag(value: Any) -> bool | None:
        return None if value is None else bool(value[0] if isinstance(value, list | tuple) else value)

    readings: list[int] = []
    for reading in range(READINGS):
        sleep(WATCHED_S / READINGS if reading else 0.0)
        bits = ask("nvmlDeviceGetCurrentClocksEventReasons")
        bits = ask("nvmlDeviceGetCurrentClocksThrottleReasons") if bits is None else bits
        if bits is not None:
            readings.append(int(bits))
    always = reduce(and_, readings) if readings else None
    return Gpu(
        others=others,
        slowed=None if always is None else throttling.names(always),
        clocks_chosen=None if always is None else bool(always & throttling.SETTING),
        power_limit=watts(ask("nvmlDeviceGetEnforcedPowerLimit")),
        power_default=watts(ask("nvmlDeviceGetPowerManagementDefaultLimit")),
        temperature_c=ask("nvmlDeviceGetTemperature", library.NVML_TEMPERATURE_GPU),
        persistence=flag(ask("nvmlDeviceGetPersistenceMode")),
        ecc=flag(ask("nvmlDeviceGetEccMode")),
        ecc_errors=ask(
            "nvmlDeviceGetTotalEccErrors", library.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, library.NVML_VOLATILE_ECC
        ),
        mig=flag(ask("nvmlDeviceGetMigMode")),
    )


# -- the sampler ------------------------------------------------------------------------------------------------------


def _sampler(index: int | None) -> Sampler:
    """Measure the telemetry's sampler: its share of a core, and how much longer work on all cores takes beside it."""
    cores = len(os.sched_getaffinity(0))
    with ThreadPoolExecutor(cores) as pool, client.Sampler(index) as sampler:
        rounds = 1
        while _work(pool, cores, rounds) < WORK_S and rounds < 1 << 10:
            rounds *= 2
        answers: list[dict[str, Any]] = []
        logs: list[float] = []
        for pair in range(PAIRS):
            times = {}
            for beside in (pair % 2 == 0, pair % 2 == 1):  # alternating, so that drift cancels
                if beside:
                    sampler.begin(os.getpid(), None)
                times[beside] = _block(pool, cores, rounds)
                if beside:
                    answers.append(sampler.end(None))
            logs.append(math.log(times[True] / times[False]))
        if sampler.lost:
            return Sampler(None, reason=sampler.lost)
    shares = [one["sampler_cpu_share"] for one in answers if one.get("sampler_cpu_share") is not None]
    if not shares:
        return Sampler(None, reason="it does not say what it used")
    found = mean_of(logs)
    slower, low, high = (math.expm1(one) for one in (found.value, found.low, found.high))
    return Sampler(sum(shares) / len(shares), slower, low, high)


_DATA = bytes(1 << 18)


def _work(pool: ThreadPoolExecutor, cores: int, rounds: int) -> float:
    """Return the seconds that `rounds` digests on every core take; they hold no lock."""

    def digest(_: int) -> None:
        for _ in range(rounds):
            hashlib.sha256(_DATA).digest()

    start = time.perf_counter()
    list(pool.map(digest, range(cores)))
    return time.perf_counter() - start


def _block(pool: ThreadPoolExecutor, cores: int, rounds: int) -> float:
    times: list[float] = []
    until = time.perf_counter() + BLOCK_S
    while time.perf_counter() < until:
        times.append(_work(pool, cores, rounds))
    return median(times)
