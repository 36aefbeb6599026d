"""Decoding and prefill of dense, depth-pruned and width-pruned shapes, in each runtime that this machine has.

Cells are those of `shortllama sweep`, measured by its code in child processes; what is compared with an earlier run
(`--benchmark-save`, `--benchmark-compare`) is the median of whole calls. The rest stands in `extra_info`.
"""

from __future__ import annotations

import pytest

from bench import environment, runtime_rows
from shortllama import blind
from shortllama.plans import shape_after
from shortllama.shape import ModelShape

DENSE = ModelShape.uniform(
    vocabulary=1024, hidden=256, head_dim=32, blocks=12, query_heads=8, kv_heads=8, neurons=688, tied=True
)
# A third fewer parameters in the blocks, by removing blocks and by narrowing all of them.
PLANS = {"dense": None, "depth:8": "depth:8", "width:5x477": "width:5x477"}
PROMPT, OUTPUT, LONG_PROMPT = 12, 16, 256
KIND = environment.machine(None).kind
# On a CPU compiling takes most of a minute a cell.
FEW = {("compile", "dense", 1), ("compile", "depth:8", 1)}
SECONDS = 0.8

DECODES = [
    (runtime, plan, batch)
    for runtime in runtime_rows.ROWS
    for plan in PLANS
    for batch in (1, 16)
    if runtime not in runtime_rows.SIMULATED
    and (runtime != "compile" or KIND == "cuda" or (runtime, plan, batch) in FEW)
    and (runtime != "paper" or batch == 1)
]


def shape_of(text: str | None) -> ModelShape:
    return DENSE if text is None else shape_after(DENSE, blind.parse(text, model="dense", shape=DENSE).keep)


def require(runtime: str) -> None:
    if refusal := runtime_rows.refusal(runtime, KIND):
        pytest.skip(refusal)


@pytest.mark.parametrize(
    ("runtime", "plan", "batch"), DECODES, ids=lambda value: f"M{value}" if value in (1, 16) else value
)
def test_decode(bench_cell, runtime: str, plan: str, batch: int):
    require(runtime)
    cell = bench_cell(
        shape_of(PLANS[plan]), runtime, name=plan, batch=batch, prompt=PROMPT, output=OUTPUT, seconds=SECONDS,
        telemetry=True, group=f"decode {runtime} M{batch} P{PROMPT} L{OUTPUT}",
    )  # fmt: skip
    assert cell.outcome == "ok"
    assert cell.row.tokens == batch * OUTPUT
    assert cell.row.graphs is None or cell.row.graphs.again == 0


@pytest.mark.parametrize("runtime", ["eager", "static"])
@pytest.mark.parametrize("plan", PLANS)
def test_prefill(bench_cell, runtime: str, plan: str):
    """Other runtimes prefill as `static` does."""
    cell = bench_cell(
        shape_of(PLANS[plan]), runtime, name=plan, prompt=LONG_PROMPT, output=1, seconds=SECONDS,
        group=f"prefill {runtime} M1 P{LONG_PROMPT}",
    )  # fmt: skip
    assert cell.outcome == "ok"
    assert cell.row.tokens == 1
