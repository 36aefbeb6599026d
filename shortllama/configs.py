"""Between a transformers `config.json` and a ModelShape, without transformers: dicts and integers only.

What cannot be expressed exactly as a ModelShape is refused by name, never approximated. Families are rows of data;
what a family's modules are called is in `shortllama/families`.
"""

from __future__ import annotations

from typing import Any

import msgspec

from shortllama.errors import InputError, UnsupportedError
from shortllama.shape import BlockShape, ModelShape

# Our own form for what no stock class can express (non-uniform widths, missing modules): the base's config, and the
# blocks' sizes. Loading it with stock transformers fails by model type, loudly.
OWN_MODEL_TYPE = "shortllama"


class Traits(msgspec.Struct, frozen=True):
    """What a config.json does not say about its family: fixed biases, norms."""

    biases: tuple[str, ...] = ()
    qk_norm: bool = False
    norms_per_module: int = 1


FAMILIES = {
    "llama": Traits(),
    "mistral": Traits(),
    "qwen2": Traits(biases=("q", "k", "v")),
    "qwen3": Traits(qk_norm=True),
}


def shape_of(config: dict[str, Any]) -> ModelShape:
    """Return the shape that a config.json describes. Raises InputError or UnsupportedError naming the field."""
    if config.get("model_type") == OWN_MODEL_TYPE:
        base = shape_of(config["base"])
        blocks = tuple(msgspec.convert(block, BlockShape) for block in config["blocks"])
        return msgspec.structs.replace(base, blocks=blocks, biases=tuple(config.get("biases", base.biases)))
    family = config.get("model_type")
    traits = FAMILIES.get(str(family))
    if traits is None:
        raise UnsupportedError(f"model type {family!r} is not supported; supported: {', '.join(FAMILIES)}")
    try:
        hidden, heads, blocks = config["hidden_size"], config["num_attention_heads"], config["num_hidden_layers"]
        return ModelShape.uniform(
            family=str(family),
            vocabulary=config["vocab_size"],
            hidden=hidden,
            head_dim=config.get("head_dim") or hidden // heads,
            blocks=blocks,
            query_heads=heads,
            kv_heads=config.get("num_key_value_heads") or heads,
            neurons=config["intermediate_size"],
            tied=bool(config.get("tie_word_embeddings", False)),
            biases=_biases(config, traits),
            qk_norm=traits.qk_norm,
            norms_per_module=traits.norms_per_module,
        )
    except KeyError as error:
        raise InputError(f"config.json of a {family} model lacks {error.args[0]!r}") from error


def _biases(config: dict[str, Any], traits: Traits) -> tuple[str, ...]:
    attention = ("q", "k", "v", "o") if config.get("attention_bias") else ()
    mlp = ("gate", "up", "down") if config.get("mlp_bias") else ()
    return tuple(dict.fromkeys((*traits.biases, *attention, *mlp)))


def config_of(shape: ModelShape) -> dict[str, Any]:
    """Return the config.json fields of a *uniform* shape for its family's stock class, as random weights need them.

    The caller resizes modules for anything else: `surgery.build` starts from the largest block.
    """
    largest = max(shape.blocks, key=lambda block: (block.query_heads, block.neurons))
    heads = max(largest.query_heads, 1)
    fields: dict[str, Any] = {
        "model_type": shape.family,
        "vocab_size": shape.vocabulary,
        "hidden_size": shape.hidden,
        "head_dim": shape.head_dim,
        "num_hidden_layers": len(shape.blocks),
        "num_attention_heads": heads,
        "num_key_value_heads": max(largest.kv_heads, 1),
        "intermediate_size": max(largest.neurons, 1),
        "tie_word_embeddings": shape.tied,
    }
    if shape.family == "llama":
        fields |= {"attention_bias": "q" in shape.biases, "mlp_bias": "gate" in shape.biases}
    if shape.family in ("mistral", "qwen2", "qwen3"):
        fields |= {"sliding_window": None}
    return fields
