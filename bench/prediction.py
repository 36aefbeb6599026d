"""How long a call takes on a device that may not be at hand: the roofline plus the cost of launching. Pure.

    step = max(bytes / bandwidth, FLOPs / rate) / efficiency + blocks x block_s + step_s

The overheads are rows of data by runtime. They are one host's figures, good for planning a sweep, not a measurement:
- paper: H100 row of Table 2 (Shortened LLaMA, arXiv 2402.02834): 0.68 ms + 0.560 ms a block at batch 1, less the bytes
  of a 7B block at 90 % of the bandwidth (0.134 ms);
- eager, static: a Llama-3.1-8B step on H100 takes 8.4 ms eager and 5.1 ms as a CUDA graph, so 0.10 ms a block;
- compile: no figure was published for this mode, so the row of `static`, which it can only undercut;
- cudagraph, roofline: a graph replay, no launches; 90 % is what a device copy reaches of an H200's bandwidth.
The nominal device `cpu` has its own rows: about 40 operations a block at some 5 us each.
"""

from __future__ import annotations

import msgspec

from bench import physics, timing
from bench.cells import Cell
from bench.devices import Device
from shortllama.shape import ModelShape


class Overheads(msgspec.Struct, frozen=True):
    """What a runtime adds to the roofline: `efficiency` (0-1) of the roof, seconds a block and a forward pass."""

    efficiency: float
    block_s: float
    step_s: float


OVERHEADS = {
    "paper": Overheads(0.9, 0.43e-3, 0.6e-3),
    "eager": Overheads(0.9, 0.10e-3, 0.1e-3),
    "static": Overheads(0.9, 0.10e-3, 0.1e-3),
    "compile": Overheads(0.9, 0.10e-3, 0.1e-3),
    "cudagraph": Overheads(0.9, 0.0, 0.0),
    "roofline": Overheads(0.9, 0.0, 0.0),
}
CPU_OVERHEADS = {
    "paper": Overheads(0.5, 0.4e-3, 0.8e-3),
    "eager": Overheads(0.5, 0.2e-3, 0.2e-3),
    "static": Overheads(0.5, 0.2e-3, 0.2e-3),
    "compile": Overheads(0.5, 0.2e-3, 0.2e-3),
    "cudagraph": Overheads(0.5, 0.0, 0.0),
    "roofline": Overheads(0.5, 0.0, 0.0),
}


def overheads(runtime: str, device: Device) -> Overheads:
    """Return the row for a runtime on a device."""
    return (CPU_OVERHEADS if device.nominal else OVERHEADS)[runtime]


def call_s(shape: ModelShape, cell: Cell, device: Device, given: Overheads | None = None) -> float:
    """Return the predicted seconds of one whole generation. Raises UnsupportedError for a rate that is not known."""
    extra = given or overheads(cell.runtime, device)
    launches = cell.output * (extra.block_s * len(shape.blocks) + extra.step_s)
    return physics.roof_s(shape, cell, device) / extra.efficiency + launches


def launch_share(shape: ModelShape, cell: Cell, device: Device, given: Overheads | None = None) -> float:
    """Return the share of a predicted call that is launching (0-1)."""
    extra = given or overheads(cell.runtime, device)
    launches = cell.output * (extra.block_s * len(shape.blocks) + extra.step_s)
    return launches / call_s(shape, cell, device, extra)


def cell_s(one_call_s: float, rule: timing.Rule) -> float:
    """Return the predicted seconds of a whole cell, warm-up and repeats by `rule`, for calls of `one_call_s`.

    Careful mode is taken to need the full least number of repeats and to use a quarter of its budget: most cells end
    by their interval, long ones by their budget.
    """
    if rule.exact:
        return sum(rule.exact) * one_call_s
    warm = min(max(timing.WARM_UP_CALLS * one_call_s, timing.WARM_UP_S), timing.PATIENCE * rule.seconds + one_call_s)
    least = max(timing.LEAST * one_call_s, rule.seconds / 4)
    longest = max(timing.PATIENCE * rule.seconds + one_call_s, timing.SHORTEST * one_call_s)
    return warm + min(least, longest)
