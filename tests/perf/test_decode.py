"""Decoding of dense, depth-pruned and width-pruned shapes in each runtime, by the sessions and statistics of sweeps."""

from __future__ import annotations

import pytest
import torch

from bench import runtimes, timing
from bench.runtimes.protocol import Call, Options
from bench.subjects import Subject
from shortllama import blind
from shortllama.plans import shape_after
from shortllama.shape import ModelShape

DENSE = ModelShape.uniform(
    vocabulary=1024, hidden=256, head_dim=32, blocks=12, query_heads=8, kv_heads=8, neurons=688, tied=True
)
# A third fewer parameters in the blocks, by removing blocks and by narrowing all of them.
PLANS = {"dense": None, "depth:8": "depth:8", "width:5x477": "width:5x477"}
PROMPT, OUTPUT = 12, 16


def shape_of(text: str | None) -> ModelShape:
    return DENSE if text is None else shape_after(DENSE, blind.parse(text, model="dense", shape=DENSE).keep)


@pytest.mark.parametrize("batch", [1, 16], ids=lambda batch: f"M{batch}")
@pytest.mark.parametrize("runtime", ["eager", "static"])
@pytest.mark.parametrize("plan", PLANS)
def test_decode(benchmark, plan: str, runtime: str, batch: int):
    benchmark.group = f"decode {runtime} M{batch} P{PROMPT} L{OUTPUT}"
    torch.set_num_threads(1)
    shape = shape_of(PLANS[plan])
    options = Options("float32", "sdpa", "cpu", 0, 1)
    session = runtimes.load(runtime).open_session(Subject(name=plan, shape=shape, dense="dense"), options)
    session.prepare(batch, PROMPT, OUTPUT)
    calls: list[Call] = []
    benchmark.pedantic(lambda: calls.append(session.call()), rounds=15, warmup_rounds=3)
    session.close()
    whole = timing.estimate([call.call_s for call in calls])
    assert whole is not None
    step_s = timing.samples(calls).step_s
    benchmark.extra_info.update(
        tokens_per_s=round(batch * OUTPUT / whole.value, 1),
        step_ms=round(1e3 * sum(step_s) / len(step_s), 4),
        parameters=shape.parameters,
        decode_bytes=shape.decode_bytes(batch, PROMPT + OUTPUT // 2, "float32"),
        achieved_bytes_per_s=round(
            shape.decode_bytes(batch, PROMPT + OUTPUT // 2, "float32") * len(step_s) / sum(step_s)
        ),
    )
    assert {call.tokens for call in calls} == {batch * OUTPUT}
