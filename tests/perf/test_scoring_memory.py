"""What gradient criteria hold at their peak: resident memory of a fresh process, against the promise and the estimate.

Weights are 4 blocks wide enough that a few MiB of an interpreter do not count, sequences short enough that 1000 of them
take seconds.
"""

from __future__ import annotations

import multiprocessing
from multiprocessing.connection import Connection
from typing import Any

import msgspec
import numpy as np
import pytest

from bench import budget, heap
from shortllama.shape import ModelShape
from shortllama.variants import Variant

SHAPE = ModelShape.uniform(
    vocabulary=512, hidden=512, head_dim=64, blocks=4, query_heads=8, kv_heads=8, neurons=1376, tied=True
)
LENGTH = 4
FEW, MANY = 10, 1000
# Blocks of gradients, with all that is not hidden states.
MOST = {"param_mix": 2.5}
ESTIMATE = 0.15
GRADIENTS = 4 * SHAPE.block_parameters(SHAPE.blocks[0])


def _calibration(samples: int) -> Any:
    from shortllama.calibration import describe

    ids = np.random.default_rng(0).integers(0, SHAPE.vocabulary, size=(samples, LENGTH))
    return describe(ids, "random", seed=0, bos=None)


def _child(answer: Connection, criterion: str, estimator: str | None, samples: int, in_file: bool) -> None:
    """Score, and send the bytes of the weights, those held beside them at the peak, and what was expected."""
    heap.fix_malloc()
    import torch

    from shortllama import scoring, surgery
    from shortllama.criteria import memory

    torch.set_num_threads(1)
    variant = Variant(estimator=estimator)

    def build(shape: ModelShape) -> Any:
        """Return a model that was scored: code paged in once, and buffers that libraries keep, are then there."""
        made = surgery.build(shape, std=0.05)
        for _ in range(2):
            scoring.score(made, criterion, _calibration(2 * FEW), variant=variant)
        return made

    build(msgspec.structs.replace(SHAPE, blocks=SHAPE.blocks[:1]))
    heap.settle()
    empty = budget.resident_bytes()
    model = build(SHAPE)
    heap.settle()
    weights = budget.resident_bytes() - empty
    used = _calibration(samples)
    need = memory.need(SHAPE, criterion, [LENGTH] * samples, variant=variant)
    assert need is not None
    if in_file:
        memory.STATES_BYTES = need.states // 2
        need = memory.need(SHAPE, criterion, [LENGTH] * samples, variant=variant)
        assert need is not None
        assert need.file
    heap.settle()
    resets, before = budget.reset_peak(), budget.resident_bytes()
    scores = scoring.score(model, criterion, used, variant=variant)
    held = budget.peak_bytes() - before
    assert scores.cost is not None
    assert scores.cost.estimated_bytes == need.beyond
    answer.send((resets, weights, held, scores.cost.peak_bytes, need.weights, need.beyond, need.states, need.file))


def measured(*arguments: Any) -> dict[str, int]:
    """Return what a fresh process says of one scoring."""
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["torch", "transformers.models.llama.modeling_llama"])
    here, there = server.Pipe(duplex=False)
    child = server.Process(target=_child, args=(there, *arguments))
    child.start()
    there.close()
    try:
        resets, *values = here.recv()
    except EOFError:
        pytest.fail("the process that was to score died")
    finally:
        child.join()
    if not resets:
        pytest.skip("this system does not let a process reset the high-water mark of its memory")
    names = ("weights", "held", "recorded", "expected_weights", "expected", "states", "file")
    return dict(zip(names, values, strict=True))


@pytest.mark.parametrize(
    ("criterion", "estimator", "samples", "in_file"),
    [
        *(
            (criterion, estimator, samples, False)
            for criterion, estimator in (
                ("taylor", None),
                ("llm-pruner", "param_first"),
                ("llm-pruner", "param_second"),
                ("llm-pruner", "param_mix"),
            )
            for samples in (FEW, MANY)
        ),
        ("taylor", None, MANY, True),
    ],
)
def test_gradients_of_one_block_and_hidden_states_are_all_that_is_held(
    benchmark, timed: bool, criterion: str, estimator: str | None, samples: int, in_file: bool
):
    benchmark.group = f"scoring: memory at {samples} samples"
    asked = (criterion, estimator, samples if timed else FEW, in_file)
    found = benchmark.pedantic(measured, args=asked, rounds=1)
    blocks = (found["held"] - found["states"]) / GRADIENTS
    total, expected = found["weights"] + found["held"], found["expected_weights"] + found["expected"]
    benchmark.extra_info.update(
        found,
        blocks_of_gradients=round(blocks, 3),
        estimate_of_total=round(expected / total, 3),
        estimate_beside_weights=round(found["expected"] / found["held"], 3),
    )
    assert found["recorded"] == pytest.approx(found["held"], abs=1 << 20)
    if timed:
        assert blocks <= MOST.get(estimator or "", 1.5)
        assert abs(expected / total - 1) <= ESTIMATE
        assert abs(found["expected"] / found["held"] - 1) <= ESTIMATE
