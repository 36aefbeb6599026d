"""Perplexity beside a bare loop of batched forward passes over the same windows."""

from __future__ import annotations

import pytest
import torch

from shortllama import pruning, sources
from shortllama.evaluation import perplexity, windows

from .conftest import ratio

LEAST_OF_BARE = 0.9


@pytest.fixture(scope="module")
def reference():
    torch.set_num_threads(1)
    return pruning.load(sources.locate(sources.REFERENCE))


def test_perplexity_against_bare_forward_passes(benchmark, interleaved, reference, tmp_path, timed: bool):
    """Reading, tokenizing, cutting, log-probabilities, sums and the digest may cost a tenth of the tokens a second."""
    benchmark.group = "evaluation: perplexity, the reference model"
    model, tokenizer = reference
    path = tmp_path / "text.txt"
    path.write_text("The model that is left keeps the blocks that matter, and says what it has lost. " * 240)
    text = windows.prepare(str(path), tokenizer=tokenizer)
    ids_WT = torch.stack([torch.from_numpy(window.ids.copy()) for window in text.windows()])
    batches = ids_WT.split(perplexity.ROWS)

    @torch.no_grad()
    def bare() -> None:
        for ids_BT in batches:
            model(input_ids=ids_BT, use_cache=False)

    result = benchmark.pedantic(perplexity.measure, args=(model, text), rounds=3, warmup_rounds=1)
    assert result.sequences == len(ids_WT)
    ours, least = interleaved(lambda: perplexity.measure(model, text), bare, 9)
    speed = 1 / ratio(ours, least)
    benchmark.extra_info.update(tokens=ids_WT.numel(), of_bare=round(speed, 3))
    if timed:
        assert speed >= LEAST_OF_BARE
