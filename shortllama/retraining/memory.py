"""What retraining will hold in memory, in bytes, before anything is loaded. Pure: shapes and a stage.

Weights, gradients and optimizer states are exact. What a block keeps for the backward pass is counted from what
transformers' Llama computes (norm, projections, rotary embedding, attention without a score matrix, gated FFN), so for
other families it is an estimate. A step has three heights, of which the greatest counts: its loss, with the logits and
all that is kept; the backward pass of the last block; and its end, where all gradients are there and little else.
Not in it: what allocators add, and the process itself (interpreter and libraries, some 400 MiB).
"""

from __future__ import annotations

import msgspec

from shortllama import layout
from shortllama.families import lookup
from shortllama.retraining.recipes import Stage
from shortllama.shape import BlockShape, ModelShape, item_bytes

# Copies of the logits in float32 at once: as computed, their log-softmax, and its gradient.
_LOGITS = 3
# With a teacher, its log-softmax too, the softmax of it, and the product of that with the difference.
_TAUGHT_LOGITS = 6


class Estimate(msgspec.Struct, frozen=True):
    """Bytes by what they hold, not all at once.

    `training`: `gradients`, AdamW's two moments, adapters. `kept`: for the backward pass. `logits`: their copies, and
    the teacher's hidden states where those are compared. `block`: what one block keeps, `working`: what its backward
    pass holds besides, with the block itself where that is computed again. `teacher`: its weights.
    """

    weights: int
    training: int
    gradients: int
    kept: int
    block: int
    working: int
    logits: int
    teacher: int

    @property
    def total(self) -> int:
        """The height of a step."""
        held = self.weights + self.teacher + self.training - self.gradients
        return held + max(self.kept + max(self.logits, self.working), self.gradients + self.block)


def estimate(
    shape: ModelShape,
    stage: Stage,
    *,
    length: int,
    stored: str,
    teacher: ModelShape | None = None,
    device: str = "cpu",
) -> Estimate:
    """Return what a stage holds on a model of `shape`, whose weights are `stored` in that dtype.

    `length`: tokens of the longest sequence. The stage's dtype must be set. `device`: a CPU's dropout keeps its factors
    as numbers, that of others a mask.
    """
    assert stage.dtype is not None
    computed = item_bytes(stage.dtype)
    held = stored if stage.trains == "lora" and stage.dtype != "float32" else "float32"
    trained = trained_parameters(shape, stage)
    tokens = stage.micro_batch * length
    stream = item_bytes(held)
    mask = 4 if device.partition(":")[0] == "cpu" else 1
    blocks = [_kept(shape, block, stage, computed, stream, mask) for block in shape.blocks]
    widest = max((3 * block.neurons + 2 * shape.hidden for block in shape.blocks), default=0) * computed
    # Weights in another dtype than is computed in are cast by each product, which keeps the copy.
    cast = computed * (shape.parameters - shape.embedding_parameters) if held != stage.dtype else 0
    if stage.checkpointing:
        kept, again = len(blocks) * shape.hidden * stream * tokens, max(blocks) * tokens
        if stage.trains == "lora":  # copies of frozen weights are kept for the block only, of trained ones for the pass
            again += max(map(shape.block_parameters, shape.blocks)) * computed if cast else 0
            cast = 0
    else:
        kept, again = sum(blocks) * tokens, 0
    logits = shape.vocabulary * 4 * (_LOGITS if teacher is None else _TAUGHT_LOGITS)
    if teacher is not None and stage.hidden:
        logits += (len(teacher.blocks) + 1) * teacher.hidden * computed
    return Estimate(
        weights=shape.parameters * item_bytes(held),
        training=trained * (12 if stage.trains == "all" else 16),
        gradients=trained * 4,
        kept=kept + cast,
        block=max(blocks) * tokens,
        working=again + widest * tokens,
        logits=tokens * logits,
        teacher=0 if teacher is None else teacher.weight_bytes(stage.dtype),
    )


def trained_parameters(shape: ModelShape, stage: Stage) -> int:
    """Return how many parameters a stage trains: all of them, or the pairs of matrices of rank r."""
    if stage.trains == "all":
        return shape.parameters
    ends = tuple(f".{path}.weight" for path in lookup(shape.family).projections.values())
    adapted = [size for name, size in layout.tensors(shape).items() if name.endswith(ends)]
    return (stage.rank or 0) * sum(rows + columns for rows, columns in adapted)


def _kept(shape: ModelShape, block: BlockShape, stage: Stage, computed: int, stream: int, mask: int) -> int:
    """Bytes that one block keeps of each token for its backward pass.

    Of a value: `computed` in products, `stream` in the residual stream, which has the dtype of the embeddings, and
    `mask` in dropout.
    """
    hidden, neurons = shape.hidden, block.neurons
    queries = block.query_heads * shape.head_dim
    keys = block.kv_heads * shape.head_dim
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
        # Each adapter keeps its input after dropout, with the mask, and what its first matrix gives; the projections'
        # own inputs are then kept by nobody. Without dropout it is these, unless they had to be cast.
        inputs = (3 * hidden + queries) * (block.query_heads > 0) + (2 * hidden + neurons) * (neurons > 0)
        kept += inputs * (computed + mask if stage.dropout else computed % 4) + computed * 7 * (stage.rank or 0)
        if stage.dropout:
            kept -= (hidden * stream + queries * computed) * (block.query_heads > 0)
            kept -= (hidden * stream + neurons * computed) * (neurons > 0)
    return kept
