"""What llama.cpp can run of a model, and by which of its architectures. Pure.

llama.cpp's `llama` applies the sizes of block 0 to all blocks, and so do the architectures of other families; `deci`,
made for Llamas from architecture search, takes heads and neurons for each block. What `deci` computes wrongly is padded
with zeros first (`padding`): block 0 without attention (the head size is read there), and attention without FFN (its
output is dropped). Read in its source, as in llama-cpp-python 0.3.36.
"""

from __future__ import annotations

from typing import Any

import msgspec

from shortllama import configs
from shortllama.errors import UnsupportedError
from shortllama.shape import BIASES, BlockShape, ModelShape


class Architecture(msgspec.Struct, frozen=True):
    """One of llama.cpp's, for blocks that are all alike.

    `varied`: the architecture of the same mathematics whose blocks may differ. `pairs`: it rotates neighbouring pairs
    of a head, not its halves. `biases`, `scalings`: those that it has. `full`: its heads fill the hidden size.
    """

    name: str
    varied: str | None = None
    pairs: bool = False
    biases: tuple[str, ...] = ()
    scalings: tuple[str, ...] = ("default", "linear")
    full: bool = False


_LLAMA = Architecture("llama", varied="deci", pairs=True, biases=BIASES, scalings=("default", "linear", "llama3"))

# Of each family, the architecture that computes it exactly. Qwen 2's own would refuse what `llama` takes.
FAMILIES: dict[str, Architecture] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": Architecture("qwen3", biases=("q", "k", "v")),
    "phi3": Architecture("phi3", full=True),
}

# Why others have none: what llama.cpp does otherwise, or cannot be told.
_WHY = {
    "gemma2": "llama.cpp rounds its activation to 16 bits and takes its windows from a fixed pattern",
    "gemma3_text": "llama.cpp rounds its activation to 16 bits and takes its windows from a fixed pattern",
    "gpt_neox": "llama.cpp rounds its activation to 16 bits",
}

# Quantizers work on 32 values at a time.
_PADDED_NEURONS = 32


def architecture(shape: ModelShape) -> str:
    """Return the name of the architecture of a shape that `expressible` made."""
    row = FAMILIES[shape.family]
    return row.name if shape.is_uniform else str(row.varied)


def rotates_pairs(shape: ModelShape) -> bool:
    """Whether the architecture rotates neighbouring pairs of each head, so that rows of q and k change places."""
    return FAMILIES[shape.family].pairs


def expressible(shape: ModelShape) -> tuple[tuple[int, ...], ModelShape]:
    """Return the blocks that are written, and the shape that is: without empty blocks, padded where `deci` needs it."""
    kept = tuple(i for i, block in enumerate(shape.blocks) if block.query_heads or block.neurons)
    if not kept:
        raise UnsupportedError("no block has an attention or an FFN; there is nothing to run")
    row = FAMILIES[shape.family]
    if row.varied is None:
        if not shape.is_uniform or not all(block.query_heads and block.neurons for block in shape.blocks):
            raise UnsupportedError(
                f"llama.cpp's {row.name} has one size for all blocks; export --to padded first, then that folder"
            )
        return kept, shape
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
    """Raise UnsupportedError for a model that no architecture of llama.cpp computes exactly."""
    row = FAMILIES.get(shape.family)
    if row is None:
        why = f": {_WHY[shape.family]}" if shape.family in _WHY else ""
        raise UnsupportedError(
            f"a GGUF file is written for {', '.join(FAMILIES)} only, this is a {shape.family} model{why}"
        )
    if configs.has_window(config):
        raise UnsupportedError(
            "a GGUF file cannot hold this model's sliding window; set sliding_window to null if unused"
        )
    if config.get("hidden_act", "silu") != "silu":
        raise UnsupportedError(f"activation {config['hidden_act']!r} has no place in a GGUF file; expected 'silu'")
    odd = [name for name in shape.biases if name not in row.biases]
    if odd:
        raise UnsupportedError(f"llama.cpp's {row.name} has no bias on {', '.join(odd)}; this model does")
    sizes = {block.query_heads * shape.head_dim for block in shape.blocks}
    if row.full and sizes != {shape.hidden}:
        raise UnsupportedError(
            f"llama.cpp's {row.name} wants heads that fill the hidden size {shape.hidden}, these have "
            f"{', '.join(map(str, sorted(sizes)))}"
        )
    kind = rope(config)["rope_type"]
    if kind not in row.scalings:
        raise UnsupportedError(
            f"llama.cpp's {row.name} has no rotary scaling {kind!r}; it has {', '.join(row.scalings)}"
        )


def rope(config: configs.Config) -> dict[str, Any]:
    """Return the rotary parameters of a config, old or new style. Raises UnsupportedError for a kind not known here."""
    scaling = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind not in ("default", "linear", "llama3"):
        raise UnsupportedError(
            f"rotary scaling {kind!r} is not written to GGUF files; expected default, linear or llama3"
        )
    share = scaling.get("partial_rotary_factor", config.get("partial_rotary_factor"))
    if share not in (None, 1, 1.0):
        raise UnsupportedError(f"partial_rotary_factor {share} is not written to GGUF files; expected whole heads")
    theta = scaling.get("rope_theta", config.get("rope_theta", 10000.0))
    return {**scaling, "rope_type": kind, "rope_theta": float(theta)}
