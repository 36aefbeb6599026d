"""What is known of devices without having them: datasheet peaks as data (`devices.json`), looked up by name.

Predictions and roofs read this table; nothing here touches hardware. Schema history: shortllama.devices/1: first.
"""

from __future__ import annotations

import difflib
import math
import os
from functools import cache
from pathlib import Path
from typing import Literal

import msgspec

from shortllama import files
from shortllama.errors import InputError, UnsupportedError


class Device(msgspec.Struct, frozen=True):
    """One device: memory in bytes, bandwidth in bytes/s, rates in FLOP/s by dtype (a dtype no source gives is absent).

    `nominal` marks a row that is good for planning only: its figures are no peaks and never serve as a roof. What a
    pass reads comes from the last-level cache where `cache_bytes` hold it; only measured devices know (0: unknown).
    """

    short: str
    name: str
    memory_bytes: int
    bandwidth: float
    flops: dict[str, float]
    nominal: bool = False
    cache_bytes: int = 0
    cache_bandwidth: float = 0.0

    def bandwidth_for(self, read_bytes: int) -> float:
        """Return the bytes/s at which a pass gets what it reads, from the cache where it fits."""
        return self.cache_bandwidth if read_bytes <= self.cache_bytes else self.bandwidth

    def rate(self, dtype: str) -> float:
        """Return the FLOP/s in `dtype`. Raises UnsupportedError where the table has no figure."""
        try:
            return self.flops[dtype]
        except KeyError:
            known = ", ".join(self.flops)
            raise UnsupportedError(f"device {self.short} has no known rate for {dtype}; known: {known}") from None


class _Entry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    short: str
    name: str
    match: tuple[str, ...]
    memory_gib: float | None
    bandwidth_gbps: float
    tflops: dict[str, float]
    sources: tuple[str, ...]
    notes: str


class _Table(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    schema: Literal["shortllama.devices/1"]
    about: str
    sources: dict[str, str]
    devices: tuple[_Entry, ...]


@cache
def _table() -> tuple[_Entry, ...]:
    path = Path(__file__).with_name("devices.json")
    return files.decode_json(files.read_bytes(path), _Table, str(path)).devices


def _device(entry: _Entry) -> Device:
    memory = host_memory_bytes() if entry.memory_gib is None else round(entry.memory_gib * (1 << 30))
    rates = {dtype: value * 1e12 for dtype, value in entry.tflops.items()}
    return Device(entry.short, entry.name, memory, entry.bandwidth_gbps * 1e9, rates, entry.memory_gib is None)


def names() -> tuple[str, ...]:
    """Return the short names that `lookup` takes."""
    return tuple(entry.short for entry in _table())


def lookup(name: str) -> Device:
    """Return the device of that short name. Raises InputError with the nearest names."""
    for entry in _table():
        if entry.short == name:
            return _device(entry)
    near = difflib.get_close_matches(name, names(), n=2, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(names())}"
    raise InputError(f"device {name!r} is unknown; {hint}")


def match(full_name: str) -> Device | None:
    """Return the device that a driver's name ("NVIDIA H100 80GB HBM3") stands for; None where the table has none."""
    for entry in _table():
        if any(part in full_name for part in entry.match):
            return _device(entry)
    return None


def unknown(name: str, memory_bytes: int) -> Device:
    """Return a device that is at hand but not in the table: its memory limits a sweep, its times are not predicted."""
    return Device(name, name, memory_bytes, math.inf, {}, nominal=True)


def host_memory_bytes() -> int:
    """Return this machine's physical memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
