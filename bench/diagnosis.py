"""From what a machine shows to what would spoil its measurements: seen, likely cause, what to try. Pure.

One small function a check, listed in CHECKS. A fact that could not be read is None, and the check says so: what was
not looked at is never called fine.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, TypeAlias

import msgspec

State: TypeAlias = Literal["fine", "trouble", "unknown"]

BUSY_SHARE = 0.1  # of one core: a process that takes more competes with what is measured
STOLEN_SHARE = 0.02
SAMPLER_SHARE = 0.02  # of one core, at most
SLOWER = 0.01
OLD_ALLOCATOR = "PYTORCH_CUDA_ALLOC_CONF"
# Settings of memory and of timing that make rows differ from everybody else's.
_CHANGES_MEMORY = (
    "PYTORCH_ALLOC_CONF",
    OLD_ALLOCATOR,
    "MALLOC_CONF",
    "MALLOC_ARENA_MAX",
    "GLIBC_TUNABLES",
    "LD_PRELOAD",
)
_HOT_C = 83.0


class Finding(msgspec.Struct, frozen=True):
    """One check. `seen` always; `cause` and `remedy` (a command or a setting) where it is trouble."""

    check: str
    state: State
    seen: str
    cause: str = ""
    remedy: str = ""


class Gpu(msgspec.Struct, frozen=True):
    """What NVML says of the device; None where it does not answer. `others`: processes that compute on it;
    `slowed`: event reasons that were set in all of several readings, by name; `clocks_chosen`: that somebody's setting
    was one of them; power in watts."""

    others: list[int] | None = None
    slowed: frozenset[str] | None = None
    clocks_chosen: bool | None = None
    power_limit: float | None = None
    power_default: float | None = None
    temperature_c: float | None = None
    persistence: bool | None = None
    ecc: bool | None = None
    ecc_errors: int | None = None
    mig: bool | None = None


class Sampler(msgspec.Struct, frozen=True):
    """What the telemetry's sampler costs: its share of one core, and how much longer work on all cores takes beside it
    (a share, with the ends of its 95 % interval)."""

    cpu_share: float | None
    slower: float | None = None
    low: float | None = None
    high: float | None = None
    reason: str = ""


class Facts(msgspec.Struct, frozen=True):
    """What was gathered. `load`: of the last minute; `busy`: other processes that compute, with their share of a core;
    `stolen`: share of CPU time that the host of a virtual machine kept; `throttled`: how often cores were too hot since
    the start; `variables`: those set that change kernels, memory or threads."""

    kind: str
    cores: int
    threads: int
    load: float
    busy: dict[str, float] | None = None
    stolen: float | None = None
    governors: frozenset[str] | None = None
    boost: bool | None = None
    throttled: int | None = None
    throttled_now: bool | None = None
    swapped: bool | None = None
    wait_policy: str | None = None
    variables: dict[str, str] = {}
    noise: float | None = None
    ceilings: bool = False
    sampler: Sampler | None = None
    gpu: Gpu | None = None


def examine(facts: Facts) -> list[Finding]:
    """Return a finding for every check that applies to the machine, in the order of CHECKS."""
    return [found for check in CHECKS if (found := check(facts)) is not None]


def _fine(check: str, seen: str) -> Finding:
    return Finding(check, "fine", seen)


def _unknown(check: str, seen: str) -> Finding:
    return Finding(check, "unknown", seen)


# -- exclusivity ------------------------------------------------------------------------------------------------------


def load(facts: Facts) -> Finding:
    """Whether other work takes the cores."""
    seen = f"load {facts.load:.2f} on {facts.cores} cores"
    others = sorted(facts.busy.items(), key=lambda item: -item[1])[:3] if facts.busy else []
    if others:
        seen += ", busy: " + ", ".join(f"{name} {share:.0%}" for name, share in others)
    # On a GPU the host launches: one free core is enough. On a CPU, threads and other work share the cores.
    room = facts.cores - (facts.threads if facts.kind == "cpu" else 1)
    if facts.load >= facts.cores or (others and facts.load > room):
        return Finding(
            "load", "trouble", seen, "other work takes the cores that are measured; times rise and scatter",
            "end it, or wait until `uptime` shows a load below 0.5",
        )  # fmt: skip
    return _fine("load", seen)


def stolen(facts: Facts) -> Finding | None:
    """Whether the host of a virtual machine gives its cores to others."""
    if facts.stolen is None:
        return None
    seen = f"{facts.stolen:.1%} of CPU time went to other guests of the host"
    if facts.stolen > STOLEN_SHARE:
        return Finding(
            "steal", "trouble", seen, "the virtual machine shares its cores, so times depend on its neighbours",
            "a dedicated machine; else more pairs: shortllama ab --pairs 5-12",
        )  # fmt: skip
    return _fine("steal", seen)


def processes(facts: Facts) -> Finding | None:
    """Whether others compute on the GPU."""
    if facts.gpu is None:
        return None
    if facts.gpu.others is None:
        return _unknown("exclusivity", "NVML does not say which processes use the device")
    if facts.gpu.others:
        listed = ", ".join(map(str, facts.gpu.others[:4]))
        return Finding(
            "exclusivity", "trouble", f"processes {listed} compute on the device",
            "they take bandwidth, clocks and memory; largest batches and times are theirs, too",
            f"end them (ps -p {facts.gpu.others[0]}), or measure on another device: --device cuda:N",
        )  # fmt: skip
    return _fine("exclusivity", "no other process computes on the device")


def memory(facts: Facts) -> Finding | None:
    """Whether the host swaps."""
    if facts.swapped is None:
        return None
    if facts.swapped:
        return Finding(
            "memory", "trouble", "pages are being swapped", "memory is short, and a fetched page costs milliseconds",
            "end what uses memory; see free -h",
        )  # fmt: skip
    return _fine("memory", "nothing is being swapped")


# -- clocks -----------------------------------------------------------------------------------------------------------


def governor(facts: Facts) -> Finding:
    """Whether the processor's clock is kept up."""
    if not facts.governors:
        return _unknown("governor", "the kernel does not show one, as in most virtual machines")
    seen = f"{', '.join(sorted(facts.governors))}{_boosting(facts.boost)}"
    if facts.governors - {"performance"}:
        return Finding(
            "governor", "trouble", seen, "clocks follow the load with a delay, so short cells run slower",
            "sudo cpupower frequency-set --governor performance",
        )  # fmt: skip
    return _fine("governor", seen)


def _boosting(boost: bool | None) -> str:
    return (
        "" if boost is None else f"; boost {'on: clocks depend on temperature and on idle cores' if boost else 'off'}"
    )


def heat(facts: Facts) -> Finding:
    """Whether the processor, or the GPU, slows down."""
    gpu = facts.gpu
    if gpu is not None:
        if gpu.slowed is None:
            return _unknown("throttling", "NVML gives no event reasons")
        at = "" if gpu.temperature_c is None else f" at {gpu.temperature_c:.0f} \u00b0C"
        if gpu.slowed:
            return Finding(
                "throttling", "trouble", f"{', '.join(sorted(gpu.slowed))} in every reading{at}",
                "the device slows down although it is idle or lightly loaded: heat, power supply, or a low power limit",
                "nvidia-smi -q -d PERFORMANCE; check fans, air and power cables",
            )  # fmt: skip
        if gpu.temperature_c is not None and gpu.temperature_c >= _HOT_C:
            return Finding(
                "throttling", "trouble", f"{gpu.temperature_c:.0f} \u00b0C before anything is measured",
                "clocks are lowered from about here on", "let it cool; nvidia-smi -q -d TEMPERATURE",
            )  # fmt: skip
        return _fine("throttling", f"none{at}")
    if facts.throttled is None:
        return _unknown("throttling", "the kernel does not count it here")
    seen = f"{facts.throttled:,} times since the machine started{', and right now' if facts.throttled_now else ''}"
    if facts.throttled_now:
        return Finding(
            "throttling", "trouble", seen, "cores are too hot, so clocks drop while cells are measured",
            "let it cool; check fans and air",
        )  # fmt: skip
    return _fine("throttling", seen)


def clocks(facts: Facts) -> Finding | None:
    """Whether the GPU's clock and power limits are the device's own."""
    gpu = facts.gpu
    if gpu is None:
        return None
    power = None if gpu.power_limit is None or gpu.power_default is None else gpu.power_limit < gpu.power_default
    if power is None and gpu.clocks_chosen is None:
        return _unknown("limits", "NVML says neither whether clocks were set nor what power is allowed")
    parts = ["clocks were set by somebody"] if gpu.clocks_chosen else []
    parts += [f"power is limited to {gpu.power_limit:.0f} of {gpu.power_default:.0f} W"] if power else []
    if parts:
        return Finding(
            "limits", "trouble", "; ".join(parts),
            "results hold for these limits, not for the device as it is sold (a set clock also makes them steadier)",
            "nvidia-smi --reset-gpu-clocks, nvidia-smi --power-limit, as the device's owner",
        )  # fmt: skip
    return _fine("limits", "clocks and power are the device's own")


def persistence(facts: Facts) -> Finding | None:
    """Whether the driver stays loaded."""
    if facts.gpu is None:
        return None
    if facts.gpu.persistence is None:
        return _unknown("persistence", "NVML does not say whether the driver stays loaded")
    if not facts.gpu.persistence:
        return Finding(
            "persistence", "trouble", "persistence mode is off",
            "the driver is loaded anew with each process: starts take seconds, and clocks begin low",
            "sudo nvidia-smi --persistence-mode=1",
        )  # fmt: skip
    return _fine("persistence", "on")


def integrity(facts: Facts) -> Finding | None:
    """ECC and MIG: what part of the device this is, and whether its memory is sound."""
    gpu = facts.gpu
    if gpu is None:
        return None
    words = {True: "on", False: "off", None: "not told"}
    seen = f"ECC {words[gpu.ecc]}, MIG {words[gpu.mig]}"
    if gpu.ecc_errors:
        return Finding(
            "ECC and MIG", "trouble", f"{seen}; {gpu.ecc_errors:,} uncorrected memory errors",
            "memory is failing; results may be wrong", "nvidia-smi -q -d ECC; have the device replaced",
        )  # fmt: skip
    if gpu.mig:
        return Finding(
            "ECC and MIG", "trouble", seen, "this is a part of a device: peaks of the whole one are not its roof",
            "judge by its own ceilings: shortllama ceilings; power and clocks are the whole device's",
        )  # fmt: skip
    return (_unknown if gpu.ecc is None and gpu.mig is None else _fine)("ECC and MIG", seen)


# -- settings ---------------------------------------------------------------------------------------------------------


def threads(facts: Facts) -> Finding:
    """Whether threads fit the cores, and sleep while they wait."""
    seen = f"{facts.threads} compute threads on {facts.cores} cores, OMP_WAIT_POLICY={facts.wait_policy or 'unset'}"
    if facts.threads > facts.cores:
        return Finding(
            "threads", "trouble", seen, "more threads than cores wait for each other at every operation",
            f"OMP_NUM_THREADS={facts.cores}, or leave it unset",
        )  # fmt: skip
    if facts.wait_policy not in (None, "passive"):
        return Finding(
            "threads", "trouble", seen,
            "threads that spin while they wait take the cores from those that work; sweeps set passive themselves, "
            "other commands do as told", "unset OMP_WAIT_POLICY",
        )  # fmt: skip
    return _fine("threads", seen)


def allocators(facts: Facts) -> Finding:
    """Whether settings change memory or kernels."""
    seen = ", ".join(f"{name}={value}" for name, value in sorted(facts.variables.items()))
    if not seen:
        return _fine("allocator and kernel settings", "none is set")
    if facts.variables.get("CUDA_LAUNCH_BLOCKING") not in (None, "0"):
        return Finding(
            "allocator and kernel settings", "trouble", seen, "every launch waits for its kernel: nothing overlaps",
            "unset CUDA_LAUNCH_BLOCKING",
        )  # fmt: skip
    changed = [name for name in _CHANGES_MEMORY if name in facts.variables]
    if changed:
        return Finding(
            "allocator and kernel settings", "trouble", seen,
            "they move where memory ends; rows carry them and compare only with rows that have the same",
            f"unset {' '.join(changed)}, unless they are what you measure",
        )  # fmt: skip
    return _fine("allocator and kernel settings", f"{seen}; part of the fingerprint of every row")


# -- what is known of the machine -------------------------------------------------------------------------------------


def sampler(facts: Facts) -> Finding | None:
    """What the telemetry costs."""
    one = facts.sampler
    if one is None:
        return None
    if one.cpu_share is None:
        return _unknown("sampler", one.reason or "it did not answer")
    seen = f"takes {one.cpu_share:.1%} of one core"
    if one.slower is not None and one.low is not None and one.high is not None:
        seen += f"; work on all cores takes {one.slower:+.1%} longer beside it"
        seen += f" (95 % interval {one.low:+.1%} to {one.high:+.1%})"
    if one.cpu_share > SAMPLER_SHARE or (one.low is not None and one.low > SLOWER):
        return Finding(
            "sampler", "trouble", seen, "reading the device is slow here, or cores are short",
            "timing passes run without it and stand; take its rows of load with care, or sweep --no-telemetry",
        )  # fmt: skip
    return _fine("sampler", seen)


def known_noise(facts: Facts) -> Finding:
    """Whether the noise between sessions was measured here."""
    if facts.noise is None:
        return Finding(
            "noise", "unknown", "how much equal code differs on this machine was not measured",
            "compare can then not tell whether two single sessions differ", "shortllama doctor --aa 5",
        )  # fmt: skip
    return _fine("noise", f"two single sessions of equal code differ by at most {facts.noise:.1%} in 95 of 100 cases")


def known_ceilings(facts: Facts) -> Finding:
    """Whether the ceilings were measured here."""
    if not facts.ceilings:
        return Finding(
            "ceilings", "unknown", "what this machine can reach was not measured",
            "reports cannot say what limits a cell", "shortllama ceilings",
        )  # fmt: skip
    return _fine("ceilings", "measured, and carried by every run")


CHECKS: tuple[Callable[[Facts], Finding | None], ...] = (
    processes, load, stolen, memory, governor, clocks, heat, persistence, integrity, threads, allocators, sampler,
    known_noise, known_ceilings,
)  # fmt: skip
