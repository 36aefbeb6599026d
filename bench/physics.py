"""Bytes and FLOPs of a call against a device's peaks: roofs. Pure.

A forward pass takes at least max(bytes / bandwidth, FLOPs / rate); a call is one prefill and output - 1 steps. The
algorithmic bytes of a step are the weights once and the tokens cached so far; what a runtime moves beyond them (all
slots of a static cache, the copies of a growing one) is reported beside, never hidden in the roof.
"""

from __future__ import annotations

from functools import lru_cache

import msgspec

from bench import runtime_rows
from bench.cells import Cell
from bench.devices import Device
from bench.measurement import Bounds
from shortllama.shape import ModelShape, item_bytes

LAUNCH_BOUND_SHARE = 0.25  # above this share of a step, launching kernels is what limits it


class Costs(msgspec.Struct, frozen=True):
    """A shape's costs in one dtype as coefficients. With c = tokens in the cache after a step, and p = prompt:

    step bytes = weights + batch c kv_token, step FLOPs = batch (linear + head + c attended);
    prefill bytes = weights + batch p kv_token, prefill FLOPs = batch (p linear + head + p (p + 1) / 2 attended).
    They equal what `ModelShape` counts, and spare walking the blocks for every cell.
    """

    weights: int
    kv_token: int
    linear: int
    head: int
    attended: int


@lru_cache(maxsize=1024)
def costs(shape: ModelShape, dtype: str) -> Costs:
    """Return the coefficients of `shape` in `dtype`."""
    first, second = shape.decode_flops(1, 0), shape.decode_flops(1, 1)
    head = 2 * shape.embedding_parameters
    return Costs(
        weights=shape.read_weight_bytes(dtype),
        kv_token=shape.kv_bytes_per_token(dtype),
        linear=2 * first - second - head,
        head=head,
        attended=second - first,
    )


def step_s(cost: Costs, bandwidth: float, rate: float, batch: int, context: int) -> tuple[float, float]:
    """Return the least seconds of one decode step with `context` tokens cached before it: (by bytes, by FLOPs)."""
    moved = cost.weights + batch * (context + 1) * cost.kv_token
    computed = batch * (cost.linear + cost.head + (context + 1) * cost.attended)
    return moved / bandwidth, computed / rate


def prefill_s(cost: Costs, bandwidth: float, rate: float, batch: int, prompt: int) -> tuple[float, float]:
    """Return the least seconds of a prefill of `prompt` tokens: (by bytes, by FLOPs)."""
    moved = cost.weights + batch * prompt * cost.kv_token
    computed = batch * (prompt * cost.linear + cost.head + prompt * (prompt + 1) * cost.attended // 2)
    return moved / bandwidth, computed / rate


def steps_s(cost: Costs, bandwidth: float, rate: float, batch: int, prompt: int, output: int) -> float:
    """Return the least seconds of all output - 1 decode steps: the sum of `max(step_s)` in closed form.

    Both bounds grow linearly with the context, so one of them leads up to a crossing and the other from there on.
    """
    count = output - 1
    by_bytes, by_flops = step_s(cost, bandwidth, rate, batch, prompt)
    bytes_growth = batch * cost.kv_token / bandwidth
    flops_growth = batch * cost.attended / rate
    if by_bytes < by_flops:  # name them so that "first" leads at the start
        first, first_growth, second, second_growth = by_flops, flops_growth, by_bytes, bytes_growth
    else:
        first, first_growth, second, second_growth = by_bytes, bytes_growth, by_flops, flops_growth
    crossing = count
    if second_growth > first_growth:
        crossing = min(count, int((first - second) / (second_growth - first_growth)) + 1)
    return _series(first, first_growth, 0, crossing) + _series(second, second_growth, crossing, count)


def _series(start: float, growth: float, first: int, last: int) -> float:
    """Return the sum of start + growth i for i in [first, last)."""
    count = last - first
    return count * start + growth * (first + last - 1) * count / 2


def roof_s(shape: ModelShape, cell: Cell, device: Device) -> float:
    """Return the least seconds of a whole call on the device's peaks. Raises UnsupportedError for an unknown rate."""
    rate = device.rate(cell.dtype)
    cost = costs(shape, cell.dtype)
    bandwidth = device.bandwidth_for(cost.weights + cell.batch * (cell.prompt + cell.output) * cost.kv_token)
    prefill = max(prefill_s(cost, bandwidth, rate, cell.batch, cell.prompt))
    return prefill + steps_s(cost, bandwidth, rate, cell.batch, cell.prompt, cell.output)


def moved_bytes(shape: ModelShape, cell: Cell, context: int) -> int:
    """Return the bytes that the cell's runtime moves in a step with `context` tokens cached before it.

    A static cache is read in all its prompt + output - 1 slots; a dynamic one is read and written once more when it
    is concatenated. An int8 matrix is converted, written and read again, unless it is compiled into the product.
    Activations are not counted.
    """
    cost = costs(shape, cell.dtype)
    token = cell.batch * cost.kv_token
    weights = cost.weights + (_converted_bytes(shape, cell.dtype) if cell.runtime != "compile" else 0)
    if runtime_rows.ROWS[cell.runtime].cache == "static":
        return weights + (cell.prompt + cell.output) * token  # every slot read, one written
    return weights + (context + 1) * token + (2 * context + 1) * token


@lru_cache(maxsize=1024)
def _converted_bytes(shape: ModelShape, dtype: str) -> int:
    """Return the bytes that converting int8 matrices to `dtype` writes and reads again; 0 for other weights."""
    if shape.quantised != "int8":
        return 0
    values = sum(one.rows * one.columns for block in shape.blocks for one in shape.matrices(block).values())
    return 2 * values * item_bytes(dtype)


def bounds(shape: ModelShape, cell: Cell, device: Device | None = None, median_s: float | None = None) -> Bounds:
    """Return the physics of `cell`: costs of the step at mid-output, the call's roof, and how near `median_s` came.

    Without a device whose peaks are known there is no roof, and `why` says so. What limits the cell takes other rows to
    tell: see `bench.regimes`.
    """
    context = cell.prompt + cell.output // 2
    known = device is not None and not device.nominal and cell.dtype in device.flops
    roof = roof_s(shape, cell, device) if known and device else None
    return Bounds(
        decode_bytes=shape.decode_bytes(cell.batch, context, cell.dtype),
        decode_flops=shape.decode_flops(cell.batch, context),
        moved_bytes=moved_bytes(shape, cell, context),
        roof_s=roof,
        achieved=roof / median_s if roof is not None and median_s else None,
        why=None if known else "the peaks of this device are not known",
    )
