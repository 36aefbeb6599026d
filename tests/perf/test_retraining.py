"""Retraining beside the barest loop that does the same, in the same run: tokens a second."""

from __future__ import annotations

import copy

import msgspec
import numpy as np
import pytest
import torch
from torch import nn

from shortllama import surgery
from shortllama.retraining import adapters, examples, loop
from shortllama.retraining.recipes import Recipe, Stage
from shortllama.shape import ModelShape

# Blocks large enough that their cost, not that of calling them, decides; steps enough that the check of the first loss,
# two more passes over one micro-batch, is a small part.
SHAPE = ModelShape.uniform(
    vocabulary=512, hidden=128, head_dim=32, blocks=4, query_heads=4, kv_heads=2, neurons=344, tied=True
)
STEPS, BATCH, LENGTH = 48, 8, 64
LEAST_OF_BARE = 0.9

FULL = Stage(trains="all", steps=STEPS, batch=BATCH, micro_batch=BATCH, length=LENGTH, held_out=0, dtype="float32")
STAGES = {
    "all": FULL,
    "lora": msgspec.structs.replace(FULL, trains="lora", rank=8, alpha=16, dropout=0.05),
    "accumulated": msgspec.structs.replace(FULL, micro_batch=BATCH // 4),
}


@pytest.fixture(scope="module")
def model():
    torch.set_num_threads(1)
    return surgery.build(SHAPE, std=0.05)


def sequences() -> list[np.ndarray]:
    return list(np.random.default_rng(0).integers(0, SHAPE.vocabulary, (STEPS * BATCH, LENGTH), dtype=np.int32))


def ours(model, stage: Stage) -> tuple[float | None, ...]:
    """What a person runs: its check of the first loss, its preparation and its putting back included."""
    data = examples._divided(sequences(), [1] * STEPS * BATCH, "random", "ids", stage)
    (done,) = loop.retrain(model, Recipe("perf", (stage,)), [data])
    return done.losses


def bare(model, stage: Stage) -> list[float]:
    """As short as such a loop can be, with the model's own loss."""
    ids = torch.from_numpy(np.stack(sequences())).long()
    if stage.trains == "lora":
        adapters.attach(model, stage)
    model.train()
    trained = [one for one in model.parameters() if one.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=stage.rate, weight_decay=0, fused=True)
    losses = []
    for step_BT in ids.split(BATCH):
        parts = step_BT.split(stage.micro_batch)
        total = 0.0
        for part_BT in parts:
            loss = model(input_ids=part_BT, labels=part_BT, use_cache=False).loss / len(parts)
            loss.backward()
            total += loss.item()
        nn.utils.clip_grad_norm_(trained, stage.clip)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    if stage.trains == "lora":
        adapters.merge(model)
    model.requires_grad_(True)
    return losses


@pytest.mark.parametrize("name", STAGES)
def test_retraining_against_a_bare_loop(benchmark, interleaved, model, timed: bool, name: str):
    benchmark.group = "retraining"
    stage = STAGES[name]
    tokens = STEPS * BATCH * LENGTH
    # The same work: both begin with the same model on the same random tokens, in another order.
    seen, expected = ours(copy.deepcopy(model), stage), bare(copy.deepcopy(model), stage)
    assert np.mean(seen) == pytest.approx(np.mean(expected), rel=0.05)
    benchmark.pedantic(ours, args=(model, stage), rounds=3, warmup_rounds=1)
    ours_s, bare_s = interleaved(lambda: ours(model, stage), lambda: bare(model, stage), 5)
    # The least disturbed run of each: what other work on the machine costs is no part of either loop.
    of_bare = min(bare_s) / min(ours_s)
    benchmark.extra_info.update(tokens=tokens, tokens_per_s_of_bare=round(of_bare, 3))
    if timed:
        assert of_bare >= LEAST_OF_BARE
