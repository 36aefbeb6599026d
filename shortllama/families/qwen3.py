"""Qwen3: Llama with a norm of size head_dim on queries and on keys, and `layer_types` as in Qwen2."""

from __future__ import annotations

from shortllama.families.family import ATTENTION_PROJECTIONS, Family

FAMILY = Family(
    model_type="qwen3",
    bias_switches={"attention_bias": ATTENTION_PROJECTIONS},
    defaults={"num_key_value_heads": 32, "head_dim": 128},
    head_norms=("self_attn.q_norm", "self_attn.k_norm"),
    sliding_window=True,
)
