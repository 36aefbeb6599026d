"""The analytic memory model: the peak of one generation in bytes, in closed form. Pure.

Two stacks, told apart by `kv_copies`:

- 1, today's (transformers 5, this project's loops). A static cache is allocated whole before the prefill; a dynamic
  one grows by concatenation, a layer at a time, and holds half a layer twice:
      static  = weights + KV(prompt + output - 1) + prefill transients
      dynamic = weights + max(KV(prompt) + prefill transients,
                              KV(prompt + output - 1) + max(half a layer of it, one step's end))
- more, the stack that the paper measured: weights + kv_copies KV(prompt + output) + 0.1 GiB. With 3 it fits Table 9 of
  Shortened LLaMA (arXiv 2402.02834) to 1.2 %: the tuple cache held the old and the new KV while concatenating, and the
  script kept the output of the run before, with its cache.

The transients were counted on live tensors of small models in float32 and bfloat16: within 3 %, or 7 % where there
are norms over q and k. `attention = "eager"` holds score matrices besides, in the prefill and in every step. Not in
them: what a GPU adds (workspaces, context, fragmentation), the sorting of HF `generate`'s sampling, and all that
recurrent families (Mamba) hold beside weights, which depends on the kernels that are installed. A cache with a window
counts as a full one. So the prediction is a lower bound for the former, an upper one for the latter.
"""

from __future__ import annotations

from functools import lru_cache

import msgspec

from bench import runtime_rows
from bench.cells import LARGEST_BATCH, Cell
from shortllama import families
from shortllama.shape import BlockShape, ModelShape, item_bytes

PAPER_KV_COPIES = 3
PAPER_FIXED_BYTES = round(0.1 * (1 << 30))


class _State(msgspec.Struct, frozen=True):
    """Bytes that depend on shape, dtype and attention alone; `wide` (attention and norms), `ffn` and `stream` are per
    token, `logits` per sequence.

    Of attention with score matrices: `score` bytes for a query and a key of a sequence, of which `kept` stay while the
    FFN runs, `query` for a query, `key` for a key; all 0 where it has none. `widened`: an int8 matrix is converted
    whole to be multiplied by, the largest decides; int4 kernels do without.
    """

    weights: int
    kv_token: int
    blocks: int
    wide: int
    ffn: int
    stream: int
    logits: int
    widened: int
    score: int
    kept: int
    query: int
    key: int

    def attending(self, batch: int, queries: int, keys: int) -> int:
        """Return what score matrices take at once, all heads of the widest block, and what is there beside them."""
        return batch * (queries * (keys * self.score + self.query) + keys * self.key)


@lru_cache(maxsize=1024)
def _state(shape: ModelShape, dtype: str, attention: str) -> _State:
    item = item_bytes(dtype)
    plain = attention == "eager" or not families.lookup(shape.family).sdpa
    widest = max(shape.blocks, key=lambda block: block.query_heads, default=None) if plain else None
    heads, shared = (widest.query_heads, widest.queries_per_group > 1) if widest is not None else (0, False)
    width = heads * shape.head_dim
    with_attention = sum(block.kv_heads > 0 for block in shape.blocks)
    return _State(
        weights=shape.weight_bytes(dtype),
        kv_token=shape.kv_bytes_per_token(dtype),
        blocks=max(with_attention, 1),
        wide=max((_wide(shape, block, item) for block in shape.blocks), default=0) * item,
        # Gate, up, product and four of the stream.
        ffn=max((3 * block.neurons + 4 * shape.hidden for block in shape.blocks), default=0) * item,
        stream=2 * shape.hidden * item,
        logits=shape.vocabulary * item,
        widened=_largest_matrix(shape) * item if shape.quantised == "int8" else 0,
        # The softmax in float32, with what it is made of or rounded to; and the mask, for all heads.
        score=8 * heads + item if heads else 0,
        # The block's code holds what its attention returned, the weights.
        kept=(heads + 1) * item if heads else 0,
        query=(3 * shape.hidden + width) * item if heads else 0,
        # K and V, repeated for the query heads that share them.
        key=2 * width * item if shared else 0,
    )


def _largest_matrix(shape: ModelShape) -> int:
    return max((one.rows * one.columns for b in set(shape.blocks) for one in shape.matrices(b).values()), default=0)


def _wide(shape: ModelShape, block: BlockShape, item: int) -> int:
    """Return the most values that attention and norms hold per token beyond the cache: q and k widths of the heads.

    Attention: three of the stream and the copies that rotating q and k makes. Norms work in float32, two values of a
    16-bit tensor each; a norm over q comes before k and v are cached.
    """
    hidden, q, k = shape.hidden, block.query_heads * shape.head_dim, block.kv_heads * shape.head_dim
    held = [3 * hidden + 3 * q + max(q, 2 * k)]
    if item == 2:
        held.append(7 * hidden)
    if item == 2 and shape.qk_norm:
        held.append(3 * hidden + 5 * q - 2 * k)
    return max(held)


def _transients(state: _State, batch: int, tokens: int, keys: int) -> int:
    """Return the activations alive at once in a forward pass over `tokens` positions of each sequence.

    The largest of the widest block, its score matrices over `keys` cached positions, and the pass's end: two copies of
    the stream and the last position's logits.
    """
    return max(
        batch * tokens * max(state.wide, state.ffn + keys * state.kept) + state.widened,
        state.attending(batch, tokens, keys),
        batch * (tokens * state.stream + state.logits),
    )


def predict(
    shape: ModelShape,
    runtime: str,
    dtype: str,
    batch: int,
    prompt: int,
    output: int,
    kv_copies: int = 1,
    attention: str = "sdpa",
) -> int:
    """Return the peak bytes of one generation, weights included (formulas: see the module's docstring)."""
    state = _state(shape, dtype, attention)
    slots = prompt + output - 1
    if kv_copies > 1:
        return state.weights + kv_copies * batch * (prompt + output) * state.kv_token + PAPER_FIXED_BYTES
    full = batch * slots * state.kv_token
    step = state.attending(batch, 1, slots)
    if runtime_rows.ROWS[runtime].cache == "static":
        return state.weights + full + max(_transients(state, batch, prompt, slots), step)
    step = max(step, full // (2 * state.blocks), batch * (state.stream + state.logits), state.widened)
    return state.weights + max(batch * prompt * state.kv_token + _transients(state, batch, prompt, prompt), full + step)


def of_cell(shape: ModelShape, cell: Cell) -> int:
    """Return the predicted peak bytes of a cell on today's stack."""
    sizes = (cell.batch, cell.prompt, cell.output)
    return predict(shape, cell.runtime, cell.dtype, *sizes, attention=cell.attention)


def largest_batch(
    shape: ModelShape,
    runtime: str,
    dtype: str,
    prompt: int,
    output: int,
    limit_bytes: int,
    kv_copies: int = 1,
    attention: str = "sdpa",
) -> int:
    """Return the largest batch whose predicted peak is within `limit_bytes`; 0 where not even one sequence fits.

    Bisection: the prediction never falls as the batch grows. Ends at LARGEST_BATCH.
    """
    low, high = 0, LARGEST_BATCH + 1
    while high - low > 1:
        middle = (low + high) // 2
        if predict(shape, runtime, dtype, middle, prompt, output, kv_copies, attention) <= limit_bytes:
            low = middle
        else:
            high = middle
    return low


def largest_of(shape: ModelShape, cell: Cell, limit_bytes: int) -> int:
    """Return the largest batch of a cell, whatever its own, as `largest_batch` does."""
    lengths = (cell.prompt, cell.output)
    return largest_batch(shape, cell.runtime, cell.dtype, *lengths, limit_bytes, attention=cell.attention)
