"""GPT-NeoX (Pythia): parallel attention and ungated FFN behind LayerNorms. Its blocks are removed whole only."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from shortllama.families.family import Family, Mixer
from shortllama.shape import BlockShape, ModelShape


def _mixer(field: Callable[[str], Any]) -> Mixer:
    hidden, neurons, heads = (int(field(n)) for n in ("hidden_size", "intermediate_size", "num_attention_heads"))
    norms = ("input_layernorm", "post_attention_layernorm")
    vectors = [(f"{name}.{leaf}", (hidden,)) for name in norms for leaf in ("weight", "bias")]
    matrices = {
        "attention.query_key_value": ((3 * hidden, hidden), bool(field("attention_bias"))),
        "attention.dense": ((hidden, hidden), bool(field("attention_bias"))),
        "mlp.dense_h_to_4h": ((neurons, hidden), True),
        "mlp.dense_4h_to_h": ((hidden, neurons), True),
    }
    tensors = [*vectors]
    for name, (dimensions, bias) in matrices.items():
        tensors += [(f"{name}.weight", dimensions), *([(f"{name}.bias", dimensions[:1])] if bias else [])]
    return Mixer(tuple(tensors), BlockShape(heads, heads, neurons), hidden // heads)


def _fields(shape: ModelShape) -> dict[str, Any]:
    return {
        "num_attention_heads": shape.hidden // shape.head_dim,
        "intermediate_size": dict(shape.mixer)["mlp.dense_h_to_4h.weight"][0],
        "attention_bias": "attention.dense.bias" in dict(shape.mixer),
    }


FAMILY = Family(
    model_type="gpt_neox",
    defaults={"attention_bias": True},
    final_norms=2,
    mixer=_mixer,
    mixer_fields=_fields,
    outgoing=("attention.dense", "mlp.dense_4h_to_h"),
    renamed={"embed_out.weight": "lm_head.weight"},
    ignored=("attention.bias", "attention.masked_bias"),
    blocks="gpt_neox.layers",
    attention="attention",
    projections={
        "qkv": "attention.query_key_value",
        "o": "attention.dense",
        "up": "mlp.dense_h_to_4h",
        "down": "mlp.dense_4h_to_h",
    },
    embedding="gpt_neox.embed_in",
    rotary="gpt_neox.rotary_emb",
    final_norm="gpt_neox.final_layer_norm",
)
