"""Write the reference model's README: `python -m shortllama.reference.card --data FOLDER`.

What training recorded, and what removing blocks does to the loss on held-out text: the choice of `ppl` against random
choices of as many blocks. `FOLDER` is the text the model was trained on, so that the same tail is held out.
"""

from __future__ import annotations

import argparse
import json
import statistics
from itertools import combinations
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerFast

from shortllama import api, files
from shortllama.plans import BlockKeep, Target, make_plan
from shortllama.reference import corpus
from shortllama.reference.train import held_out_loss, split
from shortllama.surgery import shape_of

RANDOM_CHOICES = 20
WINDOWS = 48  # of each source: enough to tell choices apart, and minutes instead of an hour
SHARE = 0.25


def without(model: Any, removed: tuple[int, ...]) -> Any:
    """Return a copy of `model` without the blocks `removed`."""
    shape = shape_of(model)
    keep = tuple(BlockKeep(i) for i in range(len(shape.blocks)) if i not in removed)
    plan = make_plan(model="reference", shape=shape, method="listed", target=Target("blocks", len(removed)), keep=keep)
    return api.apply(plan, model)


def measure(folder: Path, data: Path) -> dict[str, Any]:
    """Return the figures of the card: losses are nats per token on the held-out mixture of the training sources."""
    torch.set_num_threads(1)
    model, _ = api.load(folder, dtype="float32")
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json")).backend_tokenizer
    training = json.loads(files.read_bytes(folder / "training.json"))
    held = {
        name: (
            training["sources"][name]["weight"],
            corpus.stream(split(texts)[1], tokenizer)[: WINDOWS * training["window"]],
        )
        for name, texts in corpus.sources(data).items()
    }

    def loss(candidate: Any) -> float:
        return sum(weight * held_out_loss(candidate, stream) for weight, stream in held.values())

    blocks = len(shape_of(model).blocks)
    plan = api.plan(model, method="ppl", ratio=SHARE, seed=0)
    kept = {keep.index for keep in plan.keep}
    chosen = tuple(i for i in range(blocks) if i not in kept)
    others = [c for c in combinations(range(blocks), len(chosen)) if c != chosen]
    draws = Random(0).sample(others, RANDOM_CHOICES)
    return {
        "training": training,
        "dense": loss(model),
        "chosen": chosen,
        "chosen_loss": loss(without(model, chosen)),
        "random": sorted(loss(without(model, draw)) for draw in draws),
        "single": [loss(without(model, (i,))) for i in range(blocks)],
        "bytes": sum(file.stat().st_size for file in folder.iterdir() if file.suffix != ".md"),
    }


def render(found: dict[str, Any]) -> str:
    """Return the README's text."""
    training, random = found["training"], found["random"]
    rows = "\n".join(
        f"| {name} | {s['weight']:.2f} | {s['training_tokens']:,} | {s['held_out_tokens']:,} | {s['held_out_loss']:.3f} |"
        for name, s in training["sources"].items()
    )
    single = "\n".join(f"| {i} | {value:.3f} |" for i, value in enumerate(found["single"]))
    listed = ", ".join(map(str, found["chosen"]))
    beaten = sum(value > found["chosen_loss"] for value in random)
    return f"""# The reference model

A Llama of {training["parameters"]:,} parameters (12 blocks, hidden size 128, 8 KV groups of 2 query heads of 16, FFN 384, tied embeddings)
with its own byte-fallback BPE of 2,048 tokens, {found["bytes"] / 2**20:.1f} MiB in float16 in all. It exists so that pruning criteria, reports and tests have
real weights whose blocks differ in importance, without a download. It writes simple children's stories and little else.

## Training

`python -m shortllama.reference.train --data FOLDER --out FOLDER --mix tinystories=0.5,books=0.15,wiki=0.1,c4=0.25`, where the
folder holds the sources below, then `python -m shortllama.reference.card --data FOLDER`, which wrote this file.

| seen | value |
| --- | --- |
| tokens | {training["tokens"]:,} ({training["steps"]:,} steps of {training["rows"]} windows of {training["window"]}) |
| optimizer | Muon on the blocks' matrices, AdamW elsewhere, peak rate {training["learning_rate"]}, linear decay over the last 40 % |
| seed, threads | {training["seed"]}, {training["threads"]} |
| time | {training["seconds"] / 60:.0f} minutes on one core shared with other work, torch {training["torch"]} |
| held-out cross-entropy | {training["held_out_loss"]:.3f} nats a token (half of ln 2048 is {training["half_ln_vocabulary"]:.3f}) |

| source | share of windows | training tokens | held-out tokens | held-out loss |
| --- | --- | --- | --- | --- |
{rows}

The sources: TinyStories (CDLA-Sharing-1.0), two public-domain books from Project Gutenberg (PG-19), Wikipedia articles (CC BY-SA),
C4 documents (ODC-BY). The last 4 % of each source were held out. No instruction data was used.

## Do its blocks differ?

Cross-entropy on the first {WINDOWS} held-out windows of each source, weighted as in training, after removing a quarter of the
blocks, nothing retrained:

| removed | loss |
| --- | --- |
| nothing | {found["dense"]:.3f} |
| blocks {listed}, chosen by `ppl` on text sampled from the model itself | {found["chosen_loss"]:.3f} |
| random choices of {len(found["chosen"])}: best, median, mean, worst of {len(random)} | {random[0]:.3f}, {statistics.median(random):.3f}, {statistics.fmean(random):.3f}, {random[-1]:.3f} |

The choice of `ppl` beats {beaten} of the {len(random)} random ones. Removing one block:

| block | loss |
| --- | --- |
{single}
"""


def main() -> None:
    """Parse the command line, measure, write."""
    parser = argparse.ArgumentParser(description="Measure the reference model and write its README.")
    parser.add_argument("--data", type=Path, required=True, help="the folder of text it was trained on")
    parser.add_argument("--model", type=Path, default=Path(__file__).parent / "model")
    given = parser.parse_args()
    np.seterr(all="raise")
    files.write_atomically(given.model / "README.md", render(measure(given.model, given.data)).encode())


if __name__ == "__main__":
    main()
