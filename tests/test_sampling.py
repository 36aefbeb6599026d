"""Sampling: the model's own distribution, one seed, the same with and without a cache."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shortllama import sampling, surgery
from shortllama.errors import InputError


@pytest.fixture(scope="module")
def model():
    from shortllama.shape import ModelShape

    shape = ModelShape.uniform(vocabulary=53, hidden=32, head_dim=8, blocks=2, query_heads=4, kv_heads=2, neurons=48)
    return surgery.build(shape, dtype="float64", std=0.3, seed=3)


@given(st.lists(st.floats(-30, 30), min_size=2, max_size=12), st.floats(0, 1, exclude_max=True), st.floats(0.1, 3))
def test_draw_inverts_the_cumulative_distribution(logits, uniform, temperature):
    row = np.array(logits) / temperature
    weights = np.exp(row - row.max())
    probabilities = weights / weights.sum()
    drawn = int(sampling.draw(torch.tensor([logits]), torch.tensor([uniform]), temperature))
    below, upto = probabilities[:drawn].sum(), probabilities[: drawn + 1].sum()
    assert below - 1e-5 <= uniform <= upto + 1e-5
    assert probabilities[drawn] > 0


def test_a_token_of_probability_zero_is_never_drawn():
    logits = torch.tensor([[-torch.inf, 0.0, -torch.inf, 0.0, -torch.inf]]).repeat(3, 1)
    drawn = sampling.draw(logits, torch.tensor([0.0, 0.5, 1.0 - 1e-16], dtype=torch.float64), 1.0)
    assert drawn.tolist() == [1, 3, 3]


def test_a_sample_equals_one_drawn_without_a_cache(model):
    prompt = np.array([[1, 2], [3, 4], [5, 6]])
    ids = sampling.sample(model, prompt, 10, seed=5)
    assert ids.shape == (3, 12)
    assert ids.dtype == np.int64
    for row in range(3):
        uniform = np.random.default_rng((5, row)).random(10)
        known = prompt[row].tolist()
        for step in range(10):
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([known]), use_cache=False).logits[:, -1]
            known.append(int(sampling.draw(logits, torch.tensor([uniform[step]]), 1.0)))
        assert ids[row].tolist() == known


def test_a_larger_sample_begins_with_the_smaller_one(model, monkeypatch):
    prompt = np.full((5, 1), 1)
    small = sampling.sample(model, prompt[:2], 6)
    large = sampling.sample(model, prompt, 9)
    assert (large[:2, :7] == small).all()
    monkeypatch.setattr(sampling, "ROWS", (2, 2))
    assert (sampling.sample(model, prompt, 9) == large).all()
    assert (sampling.sample(model, prompt, 9, seed=1) != large).any()


def test_rows_are_bounded_by_the_cache(model, monkeypatch):
    """2 blocks, 32 wide, float64: a token takes 1 KiB of cache at most."""
    assert sampling._rows(model, 100) == sampling.ROWS[1]
    monkeypatch.setattr(sampling, "CACHE_BYTES", 2_600 << 10)
    assert sampling._rows(model, 100) == 26
    assert sampling._rows(model, 10_000) == sampling.ROWS[0]


def test_sampled_tokens_follow_the_distribution(model):
    ids = sampling.sample(model, np.full((600, 1), 1), 1)
    with torch.no_grad():
        expected = torch.softmax(model(input_ids=torch.tensor([[1]])).logits[0, -1], dim=-1).numpy()
    counts = np.bincount(ids[:, 1], minlength=53)
    # Pearson's statistic has mean 52 and standard deviation 10.2 under the right distribution.
    assert ((counts - 600 * expected) ** 2 / (600 * expected)).sum() < 110


def test_temperature_zero_is_greedy(model):
    prompt = np.array([[1, 2, 3]])
    expected = model.generate(
        torch.from_numpy(prompt), max_new_tokens=8, do_sample=False, pad_token_id=0, eos_token_id=None
    )
    assert sampling.sample(model, prompt, 8, temperature=0).tolist() == expected.tolist()


def test_mode_is_restored_and_progress_ends_at_the_total(model, monkeypatch):
    monkeypatch.setattr(sampling, "ROWS", (2, 2))
    calls: list[tuple[int, int]] = []
    model.train()
    try:
        sampling.sample(model, np.full((3, 1), 1), 4, progress=lambda done, total: calls.append((done, total)))
        assert model.training
    finally:
        model.eval()
    assert calls == sorted(calls)
    assert calls[-1] == (12, 12)


def test_a_broken_model_is_refused(tiny_shape):
    broken = surgery.build(tiny_shape)
    with torch.no_grad():
        broken.lm_head.weight.fill_(float("nan"))
    with pytest.raises(InputError, match="probabilities are not finite"):
        sampling.sample(broken, np.array([[1]]), 2)
