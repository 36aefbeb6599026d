"""Measures a device's ceilings: the same code on a CPU and on CUDA, where calls are captured so that launching is not
what is timed.

Operands are random: zeros run faster than any model does. What a probe is, and what its time means, is decided in
`bench.peaks`.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Generator
from typing import Any, NamedTuple

import torch
from torch.nn import functional

from bench import peaks, timing
from bench.peaks import Answer, Ask, Message, Planned, Probe

SECONDS = 0.4  # a probe's budget, as a cell's `cell_seconds`
SAMPLE_S = 2e-3  # short calls are repeated to this: clocks and synchronising then cost well under 1 %
MOST_REPEATS = 1 << 12
TOO_LONG_S = 0.06  # where a product of matrices takes this long, one of twice the side would take a probe's budget
LAUNCHES = 1000


def run(ask: Ask, send: Callable[[Message], None]) -> None:
    """Say what will be measured, then answer for each probe."""
    torch.set_num_threads(ask.threads)
    if ask.device != "cpu":
        found: Any = torch.cuda.get_device_properties(ask.device)
        free, _ = torch.cuda.mem_get_info(ask.device)
        torch.cuda.set_device(ask.device)
        ask = Ask(ask.device, ask.threads, getattr(found, "L2_cache_size", None) or None, free)
    plan = peaks.probes("cpu" if ask.device == "cpu" else "cuda", ask.cache_bytes, ask.free_bytes)
    send(Planned(plan, ask.cache_bytes))
    for answer in answers(plan, ask):
        send(answer)


def answers(probes: tuple[Probe, ...], ask: Ask) -> Generator[Answer]:
    """Yield an answer to each probe; one that fails for memory, or a dtype that the device lacks, says so."""
    slow: set[str] = set()
    for index, probe in enumerate(probes):
        if probe.kind == "matrix" and probe.way in slow:
            yield Answer(index, None, "a smaller product took long already")
            continue
        try:
            with torch.inference_mode():
                samples = _samples(_work(probe, ask), ask.device, launching=probe.way == "eager")
        except RuntimeError as error:
            yield Answer(index, None, " ".join(str(error).split())[:200])
            continue
        finally:
            gc.collect()
        found = timing.estimate(samples)
        assert found is not None
        if probe.kind == "matrix" and found.value > TOO_LONG_S:
            slow.add(probe.way)
        yield Answer(index, peaks.figure(probe, found))


# -- timing -----------------------------------------------------------------------------------------------------------


class _Work(NamedTuple):
    """A call, and how often it does a probe's work."""

    call: Callable[[], Any]
    times: int = 1


def _samples(work: _Work, device: str, *, launching: bool) -> list[float]:
    """Return seconds for doing the work once, a sample each."""
    synchronise = torch.cuda.synchronize if device != "cpu" else _nothing
    call, repeats = work.call, 1
    for _ in range(2):  # the first call loads code, starts threads and touches pages
        spent = _seconds(call, 1, synchronise)
    while spent < SAMPLE_S and repeats < MOST_REPEATS:
        repeats = min(max(2 * repeats, int(repeats * SAMPLE_S / max(spent, 1e-9))), MOST_REPEATS)
        spent = _seconds(call, repeats, synchronise)
    calls = repeats * work.times
    if device != "cpu" and not launching:
        call, repeats = _captured(call, repeats), 1
        _seconds(call, 1, synchronise)
    samples: list[float] = []
    rule = timing.careful(SECONDS)
    start = time.perf_counter()
    while not samples or not timing.stop(samples, time.perf_counter() - start, rule):
        samples.append(_seconds(call, repeats, synchronise) / calls)
    return samples


def _nothing() -> None:
    """There is nothing to wait for on a CPU."""


def _seconds(call: Callable[[], Any], repeats: int, synchronise: Callable[[], None]) -> float:
    synchronise()
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    synchronise()
    return time.perf_counter() - start


def _captured(call: Callable[[], Any], repeats: int) -> Callable[[], None]:
    """Return that many calls as one CUDA graph."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(repeats):
            call()
    return graph.replay


# -- the probes' work -------------------------------------------------------------------------------------------------


def _work(probe: Probe, ask: Ask) -> _Work:
    """Return what does a probe's work; all memory that it needs is allocated by then."""
    if probe.kind in ("read", "cache-read"):
        x = _random((probe.size // 4,), "float32", ask.device).view(getattr(torch, probe.way))
        return _Work(lambda: torch.sum(x))
    if probe.kind in ("copy", "cache-copy"):
        x = _random((probe.size // 4,), "float32", ask.device)
        y = torch.empty_like(x)
        return _Work(lambda: y.copy_(x))
    if probe.kind == "matrix":
        a, b = (_random((probe.size, probe.size), probe.way, ask.device) for _ in range(2))
        c = torch.empty_like(a)
        return _Work(lambda: torch.mm(a, b, out=c))
    if probe.kind == "launch":
        one = _random((1,), "float32", ask.device)
        return _Work(lambda: [one.add_(1.0) for _ in range(LAUNCHES)], LAUNCHES)
    return _products(probe, ask)


def _products(probe: Probe, ask: Ask) -> _Work:
    """One token times matrices in turn, as a decode step of batch 1 meets them."""
    outputs, inputs = (probe.size, peaks.HIDDEN) if probe.kind == "gemv-out" else (peaks.HIDDEN, probe.size)
    x = _random((1, inputs), probe.way, ask.device)
    first = _random((outputs, inputs), probe.way, ask.device)
    weights = [first, *(first.clone() for _ in range(1, peaks.copies(probe, ask.cache_bytes)))]
    return _Work(lambda: [functional.linear(x, weight) for weight in weights], len(weights))


def _random(shape: tuple[int, ...], dtype: str, device: str) -> torch.Tensor:
    return torch.rand(shape, device=device).sub_(0.5).to(getattr(torch, dtype))
