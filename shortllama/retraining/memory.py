"""What retraining will hold in memory, in bytes, before anything is loaded. Pure: shapes and a stage.

Weights, gradients and optimizer states are exact. What a block keeps for the backward pass is counted from what
transformers' Llama computes (norm, projections, rotary embedding, attention without a score matrix, gated FFN), so for
other families it is an estimate. What allocators add is not in it.
"""

from __future__ import annotations

import msgspec

from shortllama import layout
from shortllama.families import lookup
from shortllama.retraining.recipes import Stage
from shortllama.shape import BlockShape, ModelShape, item_bytes

# Copies of the logits in float32 at the height of a step: as computed, as compared, their softmax, and its gradient.
_LOGITS = 4
# With a teacher, its logits and their softmax too, and both distributions' products.
_TAUGHT_LOGITS = 9


class Estimate(msgspec.Struct, frozen=True):
    """Bytes by what they hold. `training`: gradients, AdamW's two moments, adapters. `kept`: for the backward pass."""

    weights: int
    training: int
    kept: int
    logits: int
    teacher: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.training + self.kept + self.logits + self.teacher


def estimate(
    shape: ModelShape, stage: Stage, *, length: int, stored: str, teacher: ModelShape | None = None
) -> Estimate:
    """Return what a stage holds on a model of `shape`, whose weights are `stored` in that dtype.

    `length`: tokens of the longest sequence. The stage's dtype must be set.
    """
    assert stage.dtype is not None
    computed = item_bytes(stage.dtype)
    frozen = item_bytes(stored) if stage.trains == "lora" and stage.dtype != "float32" else 4
    trained = trained_parameters(shape, stage)
    tokens = stage.micro_batch * length
    blocks = [_kept(shape, block, stage, computed) for block in shape.blocks]
    if stage.checkpointing:
        # Every block's input, and one block as it is computed again.
        kept = len(blocks) * shape.hidden * _stream(stage) + max(blocks)
    else:
        kept = sum(blocks)
    copies = _LOGITS if teacher is None else _TAUGHT_LOGITS
    return Estimate(
        weights=shape.parameters * frozen,
        training=trained * (12 if stage.trains == "all" else 16),
        kept=tokens * kept,
        logits=tokens * shape.vocabulary * 4 * copies,
        teacher=0 if teacher is None else teacher.weight_bytes(stage.dtype),
    )


def trained_parameters(shape: ModelShape, stage: Stage) -> int:
    """Return how many parameters a stage trains: all of them, or the pairs of matrices of rank r."""
    if stage.trains == "all":
        return shape.parameters
    ends = tuple(f".{path}.weight" for path in lookup(shape.family).projections.values())
    adapted = [size for name, size in layout.tensors(shape).items() if name.endswith(ends)]
    return (stage.rank or 0) * sum(rows + columns for rows, columns in adapted)


def _stream(stage: Stage) -> int:
    """Bytes of a value of the residual stream: trained embeddings are float32 whatever is computed in."""
    return 4 if stage.trains == "all" or stage.dtype == "float32" else 2


def _kept(shape: ModelShape, block: BlockShape, stage: Stage, computed: int) -> int:
    """Bytes that one block keeps of each token for its backward pass."""
    hidden, neurons = shape.hidden, block.neurons
    queries = block.query_heads * shape.head_dim
    keys = block.kv_heads * shape.head_dim
    stream = _stream(stage)
    kept = 0
    if block.query_heads:
        # The norm's input and output; q, k and v as attention takes them; what it gives, and the input of o.
        kept += 2 * hidden * stream + (queries + 2 * keys + 2 * queries) * computed
    if neurons:
        # The norm's; gate, its activation, up, and their product.
        kept += 2 * hidden * stream + 4 * neurons * computed
    if stage.trains == "all":
        # Norms' scale and the inputs of the projections, for their weights' gradients.
        kept += ((block.query_heads > 0) + (neurons > 0)) * hidden * computed
    else:
        # Each adapter keeps its input after dropout, with the mask, and what its first matrix gives. Without dropout
        # that is the projection's own input, unless it had to be cast.
        inputs = (3 * hidden + queries) * (block.query_heads > 0) + (2 * hidden + neurons) * (neurons > 0)
        own = computed + 1 if stage.dropout else computed % 4
        kept += inputs * own + computed * 7 * (stage.rank or 0)
    return kept
