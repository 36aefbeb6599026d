"""Scoring, surgery and checkpoint writing, each beside a naive way of doing the same in the same run."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from shortllama import blind, checkpoint, sources, surgery, tensorfile
from shortllama.calibration import describe
from shortllama.plans import BlockKeep, Target, make_plan, shape_after
from shortllama.scoring import score
from shortllama.shape import ModelShape

from .conftest import ratio

# Blocks large enough that their cost, not that of calling them, decides.
DEEP = ModelShape.uniform(
    vocabulary=512, hidden=512, head_dim=64, blocks=16, query_heads=8, kv_heads=8, neurons=1376, tied=True
)
SEQUENCES, LENGTH = 2, 64
MOST_OF_NAIVE = 0.65


@pytest.fixture(scope="module")
def deep():
    torch.set_num_threads(1)
    return surgery.build(DEEP, std=0.05)


@torch.no_grad()
def naive_ppl(model, ids_BT: torch.Tensor) -> list[float]:
    """The published way: for every block, the whole model without it runs from the start."""
    found, blocks = [], model.model.layers
    for removed in range(len(blocks)):
        model.model.layers = torch.nn.ModuleList(block for index, block in enumerate(blocks) if index != removed)
        logits_BTV = model(input_ids=ids_BT, use_cache=False).logits[:, :-1]
        nll = torch.nn.functional.cross_entropy(logits_BTV.flatten(0, 1), ids_BT[:, 1:].flatten())
        found.append(float(nll.exp()))
    model.model.layers = blocks
    return found


def test_ppl_scores_against_the_naive_way(benchmark, interleaved, deep, timed: bool):
    benchmark.group = "scoring: ppl, 16 blocks"
    generator = torch.Generator().manual_seed(0)
    ids_BT = torch.randint(DEEP.vocabulary, (SEQUENCES, LENGTH), generator=generator)
    calibration = describe([row.numpy() for row in ids_BT], "random", seed=0, bos=None)
    scores = benchmark.pedantic(score, args=(deep, "ppl", calibration), rounds=3, warmup_rounds=1)
    assert scores.blocks == pytest.approx(naive_ppl(deep, ids_BT), rel=1e-4)
    ours, naive = interleaved(lambda: score(deep, "ppl", calibration), lambda: naive_ppl(deep, ids_BT), 3)
    benchmark.extra_info["of_naive"] = round(ratio(ours, naive), 3)
    if timed:
        assert ratio(ours, naive) <= MOST_OF_NAIVE


@pytest.mark.parametrize("criterion", ["taylor", "bi", "mag", "wanda-sp", "mag-sp"])
def test_other_scores(benchmark, deep, criterion: str):
    benchmark.group = "scoring: others, 16 blocks"
    ids = torch.randint(DEEP.vocabulary, (SEQUENCES, LENGTH), generator=torch.Generator().manual_seed(0))
    calibration = describe([row.numpy() for row in ids], "random", seed=0, bos=None)
    scores = benchmark.pedantic(score, args=(deep, criterion, calibration), rounds=3, warmup_rounds=1)
    assert scores.cost is not None
    benchmark.extra_info["peak_bytes"] = scores.cost.peak_bytes


def plan_of(text: str):
    """A plan that is not blind, so that it may be written."""
    keep = blind.parse(text, model="deep", shape=DEEP).keep
    return make_plan(model="deep", shape=DEEP, method="last", target=Target("shape", text), keep=keep)


@pytest.mark.parametrize("text", ["depth:12", "width:6x1032"])
def test_surgery(benchmark, deep, text: str):
    benchmark.group = "surgery: 16 blocks"
    plan = plan_of(text)
    pruned = benchmark.pedantic(surgery.apply, args=(plan, deep), rounds=5, warmup_rounds=1)
    after = shape_after(DEEP, plan.keep)
    assert sum(parameter.numel() for parameter in pruned.parameters()) == after.parameters
    benchmark.extra_info["parameters"] = after.parameters


@pytest.fixture(scope="module")
def stored(deep, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The deep model as a checkpoint folder."""
    folder = tmp_path_factory.mktemp("deep") / "model"
    everything = make_plan(
        model="deep",
        shape=DEEP,
        method="none",
        target=Target("shape", "all"),
        keep=tuple(BlockKeep(index) for index in range(len(DEEP.blocks))),
    )
    checkpoint.save(deep, everything, folder)
    return folder


def copy_kept(folder: Path, out: Path, kept_bytes: int) -> None:
    """Read and write as many bytes as the result has, in one stream, and flush them to the disk: the floor."""
    with (folder / "model.safetensors").open("rb") as source, out.open("wb") as target:
        left = kept_bytes
        while left > 0:
            left -= target.write(source.read(min(left, tensorfile.CHUNK_BYTES)))
        target.flush()
        os.fsync(target.fileno())


@pytest.mark.parametrize("text", ["depth:12", "width:6x1032"])
def test_writing_a_pruned_checkpoint(benchmark, interleaved, stored: Path, tmp_path: Path, text: str):
    """From file to file, against a plain copy of as many bytes. Digests of all weights are part of ours."""
    benchmark.group = "checkpoint: write"
    plan, out = plan_of(text), tmp_path / "pruned"
    benchmark.pedantic(checkpoint.write, args=(stored, plan, out), rounds=3, warmup_rounds=1)
    kept = shape_after(DEEP, plan.keep).weight_bytes("float32")
    ours, floor = interleaved(
        lambda: checkpoint.write(stored, plan, out), lambda: copy_kept(stored, tmp_path / "copy", kept), 5
    )
    benchmark.extra_info.update(bytes=kept, of_a_copy=round(ratio(ours, floor), 2))
    written = load_file(out / "model.safetensors")
    assert sum(tensor.numel() for tensor in written.values()) == sources.from_folder("pruned", out).shape.parameters
