"""Scoring, surgery and checkpoint writing, each beside a naive way of doing the same in the same run."""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from shortllama import blind, checkpoint, sources, surgery, tensorfile
from shortllama.calibration import Calibration, describe
from shortllama.plans import BlockKeep, Target, make_plan, shape_after
from shortllama.removals import Goal
from shortllama.scoring import iterate, score, score_all
from shortllama.shape import ModelShape

from .conftest import ratio

# Blocks large enough that their cost, not that of calling them, decides.
DEEP = ModelShape.uniform(
    vocabulary=512, hidden=512, head_dim=64, blocks=16, query_heads=8, kv_heads=8, neurons=1376, tied=True
)
SEQUENCES, LENGTH = 2, 64
MOST_OF_NAIVE = 0.65
MOST_OF_A_FORWARD = 1.1
WATCHING = ("bi", "angular", "relative-magnitude")
STEPS = 3


@pytest.fixture(scope="module")
def deep():
    torch.set_num_threads(1)
    return surgery.build(DEEP, std=0.05)


@pytest.fixture(scope="module")
def ids_BT() -> torch.Tensor:
    return torch.randint(DEEP.vocabulary, (SEQUENCES, LENGTH), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def calibration(ids_BT: torch.Tensor) -> Calibration:
    return describe([row.numpy() for row in ids_BT], "random", seed=0, bos=None)


@pytest.fixture
def wall_ratio(timed: bool) -> Callable[..., float]:
    """Return run(a, b, pairs) -> the ratio of wall seconds, a to b, measured in turn (ABBA) on one thread."""

    def run(a: Callable[[], object], b: Callable[[], object], pairs: int) -> float:
        times: tuple[list[float], list[float]] = ([], [])
        for pair in range(pairs if timed else 1):
            for which in (0, 1) if pair % 2 else (1, 0):
                start = perf_counter()
                (a, b)[which]()
                times[which].append(perf_counter() - start)
        return ratio(*times)

    return run


@contextmanager
def only(model, kept: Iterable[int]) -> Generator[None]:
    """Let the model have the blocks `kept` only."""
    blocks = model.model.layers
    model.model.layers = torch.nn.ModuleList(blocks[index] for index in kept)
    yield
    model.model.layers = blocks


@torch.no_grad()
def naive_ppl(model, ids_BT: torch.Tensor, alive: Sequence[int] = range(len(DEEP.blocks))) -> list[float]:
    """The published way: for every block, the whole model without it runs from the start."""
    found = []
    for removed in alive:
        with only(model, [index for index in alive if index != removed]):
            logits_BTV = model(input_ids=ids_BT, use_cache=False).logits[:, :-1]
            nll = torch.nn.functional.cross_entropy(logits_BTV.flatten(0, 1), ids_BT[:, 1:].flatten())
        found.append(float(nll.exp()))
    return found


def naive_steps(model, ids_BT: torch.Tensor) -> list[str]:
    """Greedy removal the published way: every step runs every model that is one block shorter."""
    alive, order = list(range(len(DEEP.blocks))), []
    for _ in range(STEPS):
        scores = naive_ppl(model, ids_BT, alive)
        order.append(alive.pop(scores.index(min(scores))))
    return [str(block) for block in order]


def test_ppl_scores_against_the_naive_way(benchmark, wall_ratio, deep, ids_BT, calibration, timed: bool):
    benchmark.group = "scoring: ppl, 16 blocks"
    scores = benchmark.pedantic(score, args=(deep, "ppl", calibration), rounds=3, warmup_rounds=1)
    assert scores.blocks == pytest.approx(naive_ppl(deep, ids_BT), rel=1e-4)
    share = wall_ratio(lambda: score(deep, "ppl", calibration), lambda: naive_ppl(deep, ids_BT), 3)
    benchmark.extra_info["of_naive"] = round(share, 3)
    if timed:
        assert share <= MOST_OF_NAIVE


def test_iterative_ppl_against_the_naive_way(benchmark, wall_ratio, deep, ids_BT, calibration, timed: bool):
    benchmark.group = "scoring: ppl, 3 removals from 16 blocks"
    until: Any = {"goal": Goal(STEPS, "floor", "count")}
    scores = benchmark.pedantic(iterate, args=(deep, "ppl", calibration), kwargs=until, rounds=1, warmup_rounds=1)
    assert list(scores.order or ()) == naive_steps(deep, ids_BT)
    share = wall_ratio(lambda: iterate(deep, "ppl", calibration, **until), lambda: naive_steps(deep, ids_BT), 3)
    benchmark.extra_info["of_naive"] = round(share, 3)
    if timed:
        assert share <= MOST_OF_NAIVE


def test_watching_criteria_together_against_a_plain_forward(benchmark, wall_ratio, deep, timed: bool):
    """Over the published amount of data, 10 sequences of 128 tokens. The plain pass has the output head, ours has not;
    with this vocabulary the head is 1/200 of the pass."""
    benchmark.group = "scoring: bi, angular and relative-magnitude, 16 blocks"
    ids_BT = torch.randint(DEEP.vocabulary, (10, 128), generator=torch.Generator().manual_seed(0))
    calibration = describe([row.numpy() for row in ids_BT], "random", seed=0, bos=None)

    @torch.no_grad()
    def plain() -> None:
        deep(input_ids=ids_BT, use_cache=False)

    found = benchmark.pedantic(score_all, args=(deep, WATCHING, calibration), rounds=3, warmup_rounds=1)
    for name, scores in found.items():
        assert scores.digest() == score(deep, name, calibration).digest()
        assert scores.cost is not None
        assert scores.cost.block_passes == len(DEEP.blocks)
    share = wall_ratio(lambda: score_all(deep, WATCHING, calibration), plain, 7)
    benchmark.extra_info["of_a_forward"] = round(share, 3)
    if timed:
        assert share <= MOST_OF_A_FORWARD


@pytest.mark.parametrize("criterion", ["taylor", "bi", "mag", "wanda-sp", "mag-sp"])
def test_other_scores(benchmark, deep, calibration, criterion: str):
    benchmark.group = "scoring: others, 16 blocks"
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
