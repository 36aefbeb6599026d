"""Results with all that the figures about the machine read: shapes, steps, energy, ceilings' shares, searched ends."""

from __future__ import annotations

import msgspec
import report_cases as cases

from bench import regimes
from bench.cells import Cell
from bench.measurement import Bounds, Frontier, Measurement, Memory, Samples
from bench.regimes import Limits, Shares
from bench.report import hardware, holdings, series, summaries
from bench.report.values import Chart
from shortllama.shape import BlockShape, ModelShape

BLOCK_S, STEP_S = 0.5e-3, 0.7e-3
DENSE = ModelShape.uniform(vocabulary=512, hidden=128, head_dim=16, blocks=12, query_heads=8, kv_heads=8, neurons=352)
UNEVEN = tuple(BlockShape(8 - i % 3, 8 - i % 3, 300 - 20 * i) for i in range(12))
SHAPES = {
    "m": DENSE,
    "m/depth-9": msgspec.structs.replace(DENSE, blocks=DENSE.blocks[:9]),
    "m/depth-6": msgspec.structs.replace(DENSE, blocks=DENSE.blocks[:6]),
    "m/flap-20": msgspec.structs.replace(DENSE, blocks=UNEVEN),
}
BATCHES = (1, 8, 64)


def rows() -> list[Measurement]:
    """Steps of exactly STEP_S + blocks x BLOCK_S at batch 1; workspace of 1 MiB and 1 KiB a sequence."""
    env, made = cases.machine(), []
    for runtime, factor in (("eager", 1.0), ("static", 0.5)):
        for subject, shape in SHAPES.items():
            for batch in BATCHES:
                cell = Cell(subject, runtime, "float32", "sdpa", 12, 33, "none", batch)
                step = factor * (STEP_S + BLOCK_S * len(shape.blocks)) * (1 + (batch - 1) / 20)
                steps = tuple(step * (1 + i / 1000) for i in range(-16, 16))
                calls = tuple(33 * step * (1 + i / 1e4) for i in range(20))
                held = shape.weight_bytes("float32") + batch * 44 * shape.kv_bytes_per_token("float32")
                base = cases.row(cell, env, "ok", calls, parameters=shape.parameters)
                made.append(msgspec.structs.replace(
                    base, samples=Samples(call_s=calls, step_s=steps),
                    memory=Memory(allocated=held + cases.MIB + 1024 * batch),
                    bounds=Bounds(shape.decode_bytes(batch, 28, "float32"), shape.decode_flops(batch, 28)),
                    telemetry={"joules_per_token": 2.0 / batch, "host_busy": 0.5, "host_busy_max": 0.75},
                ))  # fmt: skip
    return made


def limits(row: Measurement) -> Limits:
    """Shares of a machine of 10 GB/s and 100 GFLOP/s."""
    step = regimes.step_s(row)
    assert step is not None
    assert row.bounds is not None
    shares = Shares(row.bounds.decode_bytes / step / 1e10, row.bounds.decode_flops / step / 1e11)
    return Limits("launch" if row.cell.batch == 1 else None, None, measured=shares)


def frontiers(*, confirmed: bool = True) -> list[Frontier]:
    """Searched ends at three lengths and two budgets."""
    return [
        Frontier(
            Cell(subject, "eager", "float32", "sdpa", 12, output, budget, 0), cases.machine().id,
            share * scale // (12 + output), False, confirmed=confirmed,
        )
        for budget, scale in (("32MiB", 1000), ("64MiB", 3000)) for subject, share in (("m", 4), ("m/depth-9", 6))
        for output in (32, 128, 512)
    ]  # fmt: skip


def grid(ends: list[Frontier] | None = None) -> summaries.Grid:
    """All of it."""
    made, env = rows(), cases.machine()
    sources = {env.id: cases_source(env)}
    known = [limits(row) for row in made]
    return summaries.grid(made, ends if ends is not None else frontiers(), sources, {}, known, shapes=SHAPES)


def cases_source(env):
    """The source as a report has it."""
    from bench.report.sources import Origin, describe

    return describe(env, Origin("run"))


def charts(of: summaries.Grid | None = None) -> dict[str, Chart]:
    """The figures of both modules by name."""
    found = series.charts(of or grid(), (*hardware.CHARTS, *holdings.CHARTS))
    return {chart.name: chart for chart in found}
