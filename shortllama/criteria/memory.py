"""What scoring holds in memory at its peak, in bytes, in closed form, and the batch sizes that keep it there. Pure.

Taylor and llm-pruner go backward block by block (`taylor.walk`). Beside the weights they hold

    gradients       one block's, in float32 at least (`gradients`). Second order has their squares, param_mix both. Of a
                    16-bit model also the largest weight in float32.
    hidden states   what entered each block but the first, and one gradient: L values a token and channel, in memory up
                    to STATES_BYTES and in a file beyond (`boundaries`)
    activations     of one batch in one block, or of its logits

and batches are so small that gradients and activations stay below one and a half blocks of gradients (two and a half
for param_mix), unless one sequence alone needs more. Forward criteria hold one batch: ppl and kl its states and logits,
the traced ones two of its states. Activations were counted on live memory of blocks of many sizes; the terms stand in
`_Block`. Not in here: code that a process pages in when it first computes, what an allocator does not give back,
workspaces of a GPU.

Legend: B batch, T tokens, N sequences, L blocks, D hidden, q and k widths of all query and KV heads, F neurons,
V vocabulary.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

import msgspec

from shortllama import calibration, variants
from shortllama.criteria import TRACED
from shortllama.families import lookup
from shortllama.layout import tensors
from shortllama.shape import BlockShape, ModelShape, item_bytes
from shortllama.variants import Variant

# Hidden states of a way back, or of one batch of ppl, at most.
STATES_BYTES = 1 << 30

# What a batch's activations may take beside gradients: up to this many blocks of gradients together. A fifth of a block
# below the promised one and a half, for what sums and the allocator need.
_BACKWARD_BLOCKS = 1.3

_TAYLOR = ("taylor", "taylor-sample", "taylor-vector")


class Need(msgspec.Struct, frozen=True):
    """Bytes held at the peak. `file` is what waits in a temporary file instead."""

    weights: int
    gradients: int = 0
    states: int = 0
    activations: int = 0
    file: int = 0

    @property
    def beyond(self) -> int:
        """All but the weights: what `Cost.peak_bytes` measures."""
        return self.gradients + self.states + self.activations

    def said(self) -> str:
        """Return the need in words: `needs about 1.2 GiB: weights 0.5, gradients 0.04, hidden states 0.6`."""
        total = self.weights + self.beyond
        unit, size = ("GiB", 1 << 30) if total >= 1 << 29 else ("MiB", 1 << 20)
        parts = {
            "weights": self.weights,
            "gradients": self.gradients,
            "hidden states": self.states,
            "activations": self.activations,
        }
        listed = ", ".join(f"{name} {_digits(part / size)}" for name, part in parts.items() if part)
        kept = f"; {_digits(self.file / (1 << 30))} GiB of hidden states in a temporary file" if self.file else ""
        return f"needs about {_digits(total / size)} {unit}: {listed}{kept}"


def _digits(value: float) -> str:
    """Return two significant digits, and whole numbers from 100 on."""
    return f"{value:.0f}" if value >= 100 else f"{value:.2g}"


def need(
    shape: ModelShape,
    criterion: str,
    lengths: Sequence[int],
    *,
    dtype: str = "float32",
    variant: Variant | None = None,
    iterative: bool = False,
) -> Need | None:
    """Return what scoring a model of `shape` and `dtype` by `criterion` needs on sequences of these lengths.

    None where it is not known: criteria that run blocks of another kind than attention and a gated FFN.
    """
    weights = shape.weight_bytes(dtype)
    estimator = variants.estimator_of(variant or Variant())
    backward = criterion in _TAYLOR or (criterion in variants.LLM_PRUNER and estimator not in variants.MAGNITUDES)
    if criterion == "mag-sp":
        return Need(weights, activations=max((block.widened for block in _blocks(shape, dtype)), default=0))
    if not lengths:
        return Need(weights)
    if shape.mixer:
        return None
    if backward:
        return _backward(shape, criterion, estimator, lengths, dtype)
    return _forward(shape, criterion, lengths, dtype, iterative=iterative)


# -- batches ----------------------------------------------------------------------------------------------------------


def rows_forward(shape: ModelShape, length: int, dtype: str) -> int:
    """Return how many sequences may run together: their logits, and their states at all blocks, stay bounded."""
    states = (len(shape.blocks) + 1) * length * shape.hidden * item_bytes(dtype)
    return max(1, min(calibration.rows_within(length, shape.vocabulary), STATES_BYTES // states))


def rows_backward(shape: ModelShape, length: int, dtype: str) -> int:
    """Return how many sequences may be differentiated together; see the module's first lines. At least 1."""
    blocks = _blocks(shape, dtype)
    limit = _BACKWARD_BLOCKS * max(block.gradients for block in blocks)
    beside = min(limit - block.gradients - block.widened for block in blocks)
    in_blocks = beside / max(block.backward(length) for block in blocks)
    at_the_end = limit / _tail(shape, length, dtype)
    return max(1, min(rows_forward(shape, length, dtype), int(min(in_blocks, at_the_end))))


def _tokens_together(lengths: Sequence[int], rows: Callable[[int], int]) -> tuple[int, int]:
    """Return (sequences, tokens each) of the batch with most tokens, where equally long ones run together."""
    batches = [(min(count, rows(length)), length) for length, count in Counter(lengths).items()]
    return max(batches, key=lambda batch: batch[0] * batch[1])


# -- blocks -----------------------------------------------------------------------------------------------------------


class _Block(msgspec.Struct, frozen=True):
    """Bytes of one block: gradients of all its weights and of the largest; passes take the length of a sequence."""

    shape: ModelShape
    size: BlockShape
    item: int
    gradients: int
    largest: int

    @property
    def widened(self) -> int:
        """The largest weight in float32, where that is not what it has."""
        return self.largest if self.item < _wide(self.item) else 0

    @property
    def _widths(self) -> tuple[int, int, int, int]:
        d = self.shape.head_dim
        return self.shape.hidden, self.size.query_heads * d, self.size.kv_heads * d, self.size.neurons

    def forward(self, length: int) -> int:
        """A forward pass of one sequence without gradients: beyond what enters, with what leaves."""
        hidden, q, k, f = self._widths
        scores, fused = self._scores(length), self._fused
        held = [
            (4 if fused else 3) * f + 3 * hidden,  # in the FFN
            2 * hidden + 4 * q + (3 if fused else 2) * k + 2 * scores,  # in the attention
            2 * hidden + 3 * q + (5 if fused else 4) * k,
        ]
        if scores:
            held.append(2 * hidden + 5 * q + 2 * k + scores)
        if self.item == 2:
            held.append(7 * hidden)  # norms work in float32
        return length * max(held) * self.item

    def backward(self, length: int) -> int:
        """A forward and a backward pass of one sequence: beyond what enters and its gradient, with what leaves."""
        hidden, q, k, f = self._widths
        scores, more_norms = self._scores(length), self.shape.norms_per_module - 1
        saved = 4 * q + 3 * k if self._fused else 4 * q + 2 * scores if scores else 2 * q + 2 * k
        saved += 2 * (q + k) if self.shape.qk_norm else 0
        held = [
            6 * f + (6 + 2 * more_norms) * hidden + saved,  # in the FFN
            (9 + 5 * more_norms) * hidden + saved,  # in its norm
            4 * hidden + 4 * q + 4 * k,  # in the attention
            4 * q + 4 * scores,
        ]
        entering = hidden if self.item == 2 else 0  # in float32 too
        return length * (max(held) + entering) * _wide(self.item)

    @property
    def _fused(self) -> bool:
        """Whether q, k and v come out of one matrix, gate and up of another: parts keep the whole alive."""
        return "qkv" in lookup(self.shape.family).projections

    def _scores(self, length: int) -> int:
        """Values of a matrix of attention scores, by token, where the family's attention makes one."""
        return 0 if lookup(self.shape.family).sdpa else self.size.query_heads * length


def _wide(item: int) -> int:
    """Return the bytes of a value in the precision in which gradients are made."""
    return max(item, 4)


def _blocks(shape: ModelShape, dtype: str) -> list[_Block]:
    """Return the distinct blocks that have anything in them."""
    item = item_bytes(dtype)
    found = []
    for size in dict.fromkeys(shape.blocks):
        largest = max(_block_tensors(shape, size).values(), default=0)
        if largest:
            found.append(_Block(shape, size, item, shape.block_parameters(size) * _wide(item), largest * _wide(item)))
    return found


def _block_tensors(shape: ModelShape, size: BlockShape) -> dict[str, int]:
    one = msgspec.structs.replace(shape, blocks=(size,))
    inside = f"{lookup(shape.family).blocks}.0."
    counted: dict[str, int] = {}
    for name, dimensions in tensors(one).items():
        if name.startswith(inside):
            values = 1
            for dimension in dimensions:
                values *= dimension
            counted[name] = values
    return counted


def _tail(shape: ModelShape, length: int, dtype: str) -> int:
    """Return the bytes that the loss of one sequence and its gradient take: three copies of the logits, or norms."""
    return length * max(5 * shape.hidden, 3 * shape.vocabulary) * _wide(item_bytes(dtype))


# -- criteria ---------------------------------------------------------------------------------------------------------


def states_backward(shape: ModelShape, tokens: int, dtype: str) -> int:
    """Return the bytes that wait between the blocks on a way back: the states that enter all but the first, gradients.

    They wait in a file where they are more than STATES_BYTES.
    """
    item = item_bytes(dtype)
    return tokens * shape.hidden * ((len(shape.blocks) - 1) * item + _wide(item))


def _backward(shape: ModelShape, criterion: str, estimator: str, lengths: Sequence[int], dtype: str) -> Need:
    item, blocks = item_bytes(dtype), _blocks(shape, dtype)
    alone = criterion == "taylor-sample"
    rows, length = _tokens_together(lengths, lambda length: 1 if alone else rows_backward(shape, length, dtype))
    sums = 2 if criterion in variants.LLM_PRUNER and estimator == "param_mix" else 1

    def gradients_of(block: _Block) -> int:
        return sums * block.gradients + block.widened

    waiting = states_backward(shape, sum(lengths), dtype)
    in_file = waiting > STATES_BYTES
    at_hand = 2 * rows * length * shape.hidden * _wide(item) if in_file else 0
    back = max(blocks, key=lambda block: gradients_of(block) + rows * block.backward(length))
    gradients, activations = gradients_of(back), rows * back.backward(length) + at_hand
    ahead = rows * max(_tail(shape, length, dtype), *(block.forward(length) for block in blocks)) + at_hand
    if ahead > gradients + activations:
        gradients, activations = 0, ahead
    return Need(
        shape.weight_bytes(dtype),
        gradients,
        0 if in_file else waiting,
        activations,
        waiting if in_file else 0,
    )


def _forward(shape: ModelShape, criterion: str, lengths: Sequence[int], dtype: str, *, iterative: bool) -> Need:
    item, wide = item_bytes(dtype), _wide(item_bytes(dtype))
    rows, length = _tokens_together(lengths, lambda length: rows_forward(shape, length, dtype))
    blocks, weights = _blocks(shape, dtype), shape.weight_bytes(dtype)
    hidden, boundaries = shape.hidden, len(shape.blocks) + 1
    state = rows * length * hidden * item  # of one batch at one boundary
    entering = rows * length * hidden * (0 if item == wide else wide)  # in float32 too
    passing = rows * max((block.forward(length) for block in blocks), default=0)
    width = max(max(size.neurons, size.query_heads * shape.head_dim) for size in shape.blocks)
    if criterion in TRACED:
        last = boundaries * rows * hidden * 8 if criterion == "angular" else 0  # tokens' states, in float64
        return Need(weights, activations=2 * (state + entering) + passing + last)
    if criterion == "wanda-sp":
        squared = rows * length * (2 * hidden * item + width * (item + (wide if item == wide else 2 * wide)))
        return Need(weights, states=2 * sum(lengths) * hidden * item - state, activations=max(passing, squared))
    if criterion in variants.FLAP:
        return Need(weights, states=(boundaries - 1) * state, activations=passing + 2 * length * width * 8)
    logits = rows * length * shape.vocabulary
    compared = logits * (item + wide * (2 if rows > 1 or item < wide else 1))
    resumed = passing + state
    if criterion == "kl":
        sequence = 4 * length * shape.vocabulary * wide
        compared = logits * (item + wide) + max(sequence, logits * wide if item < wide else 0)
        resumed += logits * wide
    kept = sum(lengths) * hidden * item if iterative else 0
    return Need(weights, states=boundaries * state + kept, activations=max(resumed, compared))
