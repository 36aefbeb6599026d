"""What llama.cpp can run of a Llama-like model, and by which of its architectures. Pure.

llama.cpp's `llama` applies the sizes of block 0 to all blocks; `deci`, made for Llamas from architecture search, takes
heads and neurons for each block. What `deci` computes wrongly is padded with zeros first (`padding`): block 0 without
attention (the head size is read there), and attention without FFN (its output is dropped).
"""

from __future__ import annotations

from typing import Any

import msgspec

from shortllama import configs
from shortllama.errors import UnsupportedError
from shortllama.shape import BlockShape, ModelShape

# Families whose mathematics is llama.cpp's `llama`; of others it has architectures of their own.
FAMILIES = ("llama", "mistral", "qwen2")

# Quantizers work on 32 values at a time.
_PADDED_NEURONS = 32


def architecture(shape: ModelShape) -> str:
    """Return the architecture of a shape that `expressible` made: `llama` where all blocks are alike, else `deci`."""
    return "llama" if shape.is_uniform else "deci"


def expressible(shape: ModelShape) -> tuple[tuple[int, ...], ModelShape]:
    """Return the blocks that are written, and the shape that is: without empty blocks, padded where `deci` needs it."""
    kept = tuple(i for i, block in enumerate(shape.blocks) if block.query_heads or block.neurons)
    if not kept:
        raise UnsupportedError("no block has an attention or an FFN; there is nothing to run")
    group = next((b.query_heads // b.kv_heads for b in shape.blocks if b.kv_heads), 1)
    blocks: list[BlockShape] = []
    for position, block in enumerate(shape.blocks[i] for i in kept):
        if position == 0 and not block.query_heads:
            block = msgspec.structs.replace(block, query_heads=group, kv_heads=1)
        if not block.neurons:
            block = msgspec.structs.replace(block, neurons=_PADDED_NEURONS)
        blocks.append(block)
    return kept, msgspec.structs.replace(shape, blocks=tuple(blocks))


def refuse(shape: ModelShape, config: configs.Config) -> None:
    """Raise UnsupportedError for a model that llama.cpp's `llama` and `deci` do not compute exactly."""
    if shape.family not in FAMILIES:
        raise UnsupportedError(f"a GGUF file is written for {', '.join(FAMILIES)} only, this is a {shape.family} model")
    if configs.has_window(config):
        raise UnsupportedError(
            "a GGUF file cannot hold this model's sliding window; set sliding_window to null if unused"
        )
    if config.get("hidden_act", "silu") != "silu":
        raise UnsupportedError(f"activation {config['hidden_act']!r} has no place in a GGUF file; expected 'silu'")
    odd = [block.query_heads for block in shape.blocks if block.query_heads * shape.head_dim not in (0, shape.hidden)]
    if "q" in shape.biases and odd:
        raise UnsupportedError(
            f"llama.cpp wants a query bias of the hidden size {shape.hidden}; {odd[0]} heads of {shape.head_dim} have "
            "another; export the padded folder"
        )
    rope(config)


def rope(config: configs.Config) -> dict[str, Any]:
    """Return the rotary parameters of a config, old or new style. Raises UnsupportedError for a kind not known here."""
    scaling = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind not in ("default", "linear", "llama3"):
        raise UnsupportedError(
            f"rotary scaling {kind!r} is not written to GGUF files; expected default, linear or llama3"
        )
    theta = scaling.get("rope_theta", config.get("rope_theta", 10000.0))
    return {**scaling, "rope_type": kind, "rope_theta": float(theta)}
