"""The analytic memory model: the peak of one generation in bytes, in closed form. Pure.

Two stacks, told apart by `kv_copies`:

- 1, today's (transformers 5, this project's loops). A static cache is allocated whole before the prefill; a dynamic
  one grows by concatenation, a layer at a time, and holds half a layer twice:
      static  = weights + KV(prompt + output - 1) + prefill transients
      dynamic = weights + max(KV(prompt) + prefill transients, KV(prompt + output - 1) (1 + 1 / (2 blocks)))
- more, the stack that the paper measured: weights + kv_copies KV(prompt + output) + 0.1 GiB. With 3 it fits Table 9 of
  Shortened LLaMA (arXiv 2402.02834) to 1.2 %: the tuple cache held the old and the new KV while concatenating, and the
  script kept the output of the run before, with its cache.

The transients were fitted on CPU and checked against a count of live tensors; what a GPU adds (workspaces, context,
fragmentation) is not in them.
"""

from __future__ import annotations

from functools import lru_cache

import msgspec

from bench.cells import LARGEST_BATCH
from shortllama.shape import ModelShape, item_bytes

CACHES = {"paper": "dynamic", "eager": "dynamic", "static": "static", "roofline": "static"}
PAPER_KV_COPIES = 3
PAPER_FIXED_BYTES = round(0.1 * (1 << 30))


class _State(msgspec.Struct, frozen=True):
    """Bytes that depend on shape and dtype alone; `wide` and `logits` are per token and per sequence."""

    weights: int
    kv_token: int
    blocks: int
    wide: int
    stream: int
    logits: int


@lru_cache(maxsize=1024)
def _state(shape: ModelShape, dtype: str) -> _State:
    item = item_bytes(dtype)
    neurons = max((block.neurons for block in shape.blocks), default=0)
    with_attention = sum(block.kv_heads > 0 for block in shape.blocks)
    return _State(
        weights=shape.weight_bytes(dtype),
        kv_token=shape.kv_bytes_per_token(dtype),
        blocks=max(with_attention, 1),
        wide=(3 * neurons + 4 * shape.hidden) * item,
        stream=2 * shape.hidden * item,
        logits=shape.vocabulary * item,
    )


def transient_bytes(shape: ModelShape, dtype: str, batch: int, tokens: int) -> int:
    """Return the activations alive at once in a forward pass over `tokens` positions of each sequence.

    Inside the widest block: batch x tokens x (3 neurons + 4 hidden) values; at the end: two copies of the stream and
    the last position's logits. The larger of the two.
    """
    state = _state(shape, dtype)
    return batch * max(tokens * state.wide, tokens * state.stream + state.logits)


def predict(
    shape: ModelShape, runtime: str, dtype: str, batch: int, prompt: int, output: int, kv_copies: int = 1
) -> int:
    """Return the peak bytes of one generation, weights included (formulas: see the module's docstring)."""
    state = _state(shape, dtype)
    if kv_copies > 1:
        return state.weights + kv_copies * batch * (prompt + output) * state.kv_token + PAPER_FIXED_BYTES
    full = batch * (prompt + output - 1) * state.kv_token
    prefill = transient_bytes(shape, dtype, batch, prompt)
    if CACHES[runtime] == "static":
        return state.weights + full + prefill
    grown = full + full // (2 * state.blocks)
    return state.weights + max(batch * prompt * state.kv_token + prefill, grown)


def largest_batch(
    shape: ModelShape, runtime: str, dtype: str, prompt: int, output: int, limit_bytes: int, kv_copies: int = 1
) -> int:
    """Return the largest batch whose predicted peak is within `limit_bytes`; 0 where not even one sequence fits.

    Bisection: the prediction never falls as the batch grows. Ends at LARGEST_BATCH.
    """
    low, high = 0, LARGEST_BATCH + 1
    while high - low > 1:
        middle = (low + high) // 2
        if predict(shape, runtime, dtype, middle, prompt, output, kv_copies) <= limit_bytes:
            low = middle
        else:
            high = middle
    return low
