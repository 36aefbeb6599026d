"""Gemma 2 and 3 (text): norms before and after each module, whose weights count from zero; windows by `layer_types`."""

from __future__ import annotations

import msgspec

from shortllama.families.family import ATTENTION_PROJECTIONS, Family

GEMMA2 = Family(
    model_type="gemma2",
    bias_switches={"attention_bias": ATTENTION_PROJECTIONS},
    defaults={"num_key_value_heads": 4, "head_dim": 256, "tie_word_embeddings": True},
    any_heads=False,
    sdpa=False,  # it caps attention scores, which the fused kernels cannot
    pattern=2,
    norms_per_module=2,
    norm_weight=0.0,
    needs_bos=True,
    attention_norms=("input_layernorm", "post_attention_layernorm"),
    mlp_norms=("pre_feedforward_layernorm", "post_feedforward_layernorm"),
)

GEMMA3 = msgspec.structs.replace(
    GEMMA2,
    model_type="gemma3_text",
    head_norms=("self_attn.q_norm", "self_attn.k_norm"),
    pattern=6,
    sdpa=True,
)
