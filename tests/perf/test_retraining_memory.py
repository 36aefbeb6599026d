"""What retraining holds at its peak beside the weights: resident memory of a fresh process, against the estimate.

Two shapes: the logits decide one, what is kept for the backward pass the other; both are large enough that a few MiB of
an interpreter do not count.
"""

from __future__ import annotations

import multiprocessing
from multiprocessing.connection import Connection
from typing import Any

import msgspec
import numpy as np
import pytest

from bench import budget, heap
from shortllama.retraining.recipes import Stage
from shortllama.shape import ModelShape

SHAPES = {
    "wide vocabulary": ModelShape.uniform(
        vocabulary=8192, hidden=128, head_dim=32, blocks=4, query_heads=4, kv_heads=2, neurons=344, tied=True
    ),
    "deep": ModelShape.uniform(
        vocabulary=512, hidden=256, head_dim=32, blocks=6, query_heads=8, kv_heads=4, neurons=688, tied=True
    ),
}
FULL = Stage(trains="all", steps=2, batch=8, micro_batch=8, length=64, held_out=0, dtype="float32")
STAGES = {
    "lora": msgspec.structs.replace(FULL, trains="lora", rank=8, alpha=16, dropout=0.05),
    "cpt": FULL,
    "distill": msgspec.structs.replace(FULL, learns="teacher", temperature=1.0, hidden=1.0),
}
ESTIMATE = 0.15


def _child(answer: Connection, shape: ModelShape, stage: Stage) -> None:
    """Retrain, and send the bytes held beside the weights at the peak, as seen, as recorded and as estimated."""
    heap.fix_malloc()
    import torch

    from shortllama import surgery
    from shortllama.retraining import examples, loop, memory
    from shortllama.retraining.objectives import Teacher
    from shortllama.retraining.recipes import Recipe

    torch.set_num_threads(1)
    model, teacher = surgery.build(shape, std=0.05), None
    if stage.learns == "teacher":
        dense = surgery.build(shape, std=0.05, seed=1).requires_grad_(False)
        teacher = Teacher(dense, "dense", tuple(range(len(shape.blocks))))

    def run(steps: int) -> Any:
        rng = np.random.default_rng(0)
        ids = list(rng.integers(0, shape.vocabulary, (steps * stage.batch, stage.length), dtype=np.int32))
        given = msgspec.structs.replace(stage, steps=steps)
        data = examples._divided(ids, [1] * len(ids), "random", "ids", given)
        return loop.retrain(model, Recipe("perf", (given,)), [data], teacher=teacher)[0]

    run(1)  # code paged in once, and buffers that libraries keep, are then there
    heap.settle()
    resets, before = budget.reset_peak(), budget.resident_bytes()
    assert stage.steps is not None
    done = run(stage.steps)
    held = budget.peak_bytes() - before
    need = memory.estimate(
        shape, stage, length=stage.length, stored="float32", teacher=None if teacher is None else shape
    )
    answer.send((resets, held, done.cost.peak_bytes, need.total - need.weights - need.teacher))


def measured(shape: ModelShape, stage: Stage) -> dict[str, int]:
    """Return what a fresh process says of one retraining."""
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["torch", "transformers.models.llama.modeling_llama", "peft"])
    here, there = server.Pipe(duplex=False)
    child = server.Process(target=_child, args=(there, shape, stage))
    child.start()
    there.close()
    try:
        resets, *values = here.recv()
    except EOFError:
        pytest.fail("the process that was to retrain died")
    finally:
        child.join()
    if not resets:
        pytest.skip("this system does not let a process reset the high-water mark of its memory")
    return dict(zip(("held", "recorded", "expected"), values, strict=True))


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("name", STAGES)
@pytest.mark.parametrize("kind", SHAPES)
def test_the_estimate_is_what_is_held(benchmark, timed: bool, kind: str, name: str, checkpointing: bool):
    benchmark.group = "retraining: memory"
    stage = msgspec.structs.replace(STAGES[name], checkpointing=checkpointing)
    found = benchmark.pedantic(measured, args=(SHAPES[kind], stage), rounds=1)
    benchmark.extra_info.update(found, estimate_beside_weights=round(found["expected"] / found["held"], 3))
    if timed:
        assert abs(found["expected"] / found["held"] - 1) <= ESTIMATE
