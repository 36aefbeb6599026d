"""Text from a model itself: tokens drawn from its own distribution, with a cache, one seed, the same every time.

Used by `self` calibration, where nothing may be truncated (the sample must be the model's distribution, so that the
perplexity of a pruned model on it is a divergence from the dense one), and for generation samples.

Legend: N sequences, P prompt tokens, T new tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

from shortllama.errors import InputError
from shortllama.families import lookup

Progress = Callable[[int, int], None]

# Sequences decoded together: as many as keep the cache within a bound. It depends on the model and the length alone, so
# that asking for more sequences changes no earlier one. Small models need many rows to keep even one core busy.
ROWS = (16, 128)
CACHE_BYTES = 256 << 20


@torch.no_grad()
def sample(
    model: Any,
    prompt_NP: np.ndarray,
    tokens: int,
    *,
    seed: int = 0,
    temperature: float = 1.0,
    progress: Progress | None = None,
) -> np.ndarray:
    """Return (N, P + tokens) int64 ids: the prompts, each continued by `tokens` draws from the model's distribution.

    Temperature 0 is greedy. No top-k or top-p, and an end-of-text token does not stop a sequence. Sequence n depends
    on its prompt, `seed` and n only, so a longer or wider sample begins with the shorter one (to the rounding of
    the matrix products). Raises InputError where the model's probabilities are not finite.
    """
    random_NT = np.stack([np.random.default_rng((seed, n)).random(tokens) for n in range(len(prompt_NP))])
    together = _rows(model, prompt_NP.shape[1] + tokens)
    training = model.training
    model.eval()
    try:
        parts: list[np.ndarray] = []
        for first in range(0, len(prompt_NP), together):
            rows = slice(first, first + together)
            done = first * tokens

            def tick(step: int, done: int = done, count: int = len(prompt_NP[rows])) -> None:
                if progress is not None:
                    progress(done + step * count, len(prompt_NP) * tokens)

            parts.append(_continue(model, prompt_NP[rows], random_NT[rows], temperature, tick))
        return np.concatenate(parts)
    finally:
        model.train(training)


def _rows(model: Any, tokens: int) -> int:
    """Return how many sequences of so many tokens are decoded together; the fewest where their cache is not known."""
    config = model.config.get_text_config(decoder=True)
    blocks, hidden = (getattr(config, name, None) for name in ("num_hidden_layers", "hidden_size"))
    if blocks is None or hidden is None:
        return ROWS[0]
    # As wide as the stream at most, where heads are not shared; K and V.
    widest = 2 * blocks * tokens * hidden * model.get_input_embeddings().weight.element_size()
    return min(max(CACHE_BYTES // widest, ROWS[0]), ROWS[1])


def _continue(
    model: Any, prompt_NP: np.ndarray, random_NT: np.ndarray, temperature: float, tick: Callable[[int], None]
) -> np.ndarray:
    device = model.get_input_embeddings().weight.device
    ids = torch.from_numpy(prompt_NP.astype(np.int64)).to(device)
    random = torch.from_numpy(random_NT).to(device)
    # Without a cache that can be trusted, everything so far is run again for each token.
    name = lookup(model.config.model_type).cache
    cache: Any = _reserved(model.config, ids.shape[1] + random.shape[1]) if name == "past_key_values" else None
    step_ids = ids
    for step in range(random.shape[1]):
        kept = {"use_cache": False} if name is None else {"use_cache": True, name: cache}
        output = model(input_ids=step_ids, logits_to_keep=1, **kept)
        cache = None if name is None else getattr(output, name)
        drawn = draw(output.logits[:, -1], random[:, step], temperature)[:, None]
        ids = torch.cat([ids, drawn], dim=1)
        step_ids = ids if name is None else drawn
        tick(step + 1)
    return ids.cpu().numpy()


class _Reserved(DynamicLayer):
    """A growing layer whose room for `tokens` is there from the start: concatenating took most of the time.

    What it returns has the same values as the layer that it stands for: attention reads them through strides.
    """

    def __init__(self, tokens: int) -> None:
        super().__init__()
        self._tokens = tokens

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        super().lazy_initialization(key_states, value_states)
        self._room = [
            torch.empty((*one.shape[:-2], self._tokens, one.shape[-1]), dtype=one.dtype, device=one.device)
            for one in (key_states, value_states)
        ]

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        held = self.get_seq_length()
        end = held + key_states.shape[-2]
        for room, states in zip(self._room, (key_states, value_states), strict=True):
            room[..., held:end, :] = states
        self.keys, self.values = (room[..., :end, :] for room in self._room)
        return self.keys, self.values


def _reserved(config: Any, tokens: int) -> DynamicCache:
    """Return the cache that a model of this config makes for itself, with its plain layers reserved."""
    cache = DynamicCache(config=config)
    cache.layers = [_Reserved(tokens) if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


def draw(logits_NV: Tensor, uniform_N: Tensor, temperature: float) -> Tensor:
    """Return (N,) token ids by the inverse of the cumulative distribution, in float64; temperature 0 takes the best.

    A token of probability zero is never drawn.
    """
    if temperature == 0:
        return logits_NV.argmax(dim=-1)
    probabilities_NV = torch.softmax(logits_NV.double() / temperature, dim=-1)
    if not torch.isfinite(probabilities_NV).all():
        raise InputError("the model's probabilities are not finite, so nothing can be sampled; check weights and dtype")
    cumulative_NV = probabilities_NV.cumsum(dim=-1)
    threshold_N1 = uniform_N[:, None].double() * cumulative_NV[:, -1:]
    # At the very end rounding could point past the last token that has any probability.
    last_N = probabilities_NV.shape[1] - 1 - (probabilities_NV.flip(-1) > 0).int().argmax(dim=-1)
    return torch.minimum(torch.searchsorted(cumulative_NV, threshold_N1, right=True)[:, 0], last_N)
