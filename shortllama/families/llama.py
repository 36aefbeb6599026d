"""Llama: LLaMA 1 to 3.2, Vicuna, and most models that call themselves Llama-like."""

from __future__ import annotations

from shortllama.families.family import ATTENTION_PROJECTIONS, MLP_PROJECTIONS, Family

FAMILY = Family(
    model_type="llama",
    bias_switches={"attention_bias": ATTENTION_PROJECTIONS, "mlp_bias": MLP_PROJECTIONS},
    # LlamaConfig wants hidden_size to be a multiple of the heads even where head_dim is given (transformers 5.23).
    any_heads=False,
)
