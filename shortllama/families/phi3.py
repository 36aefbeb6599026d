"""Phi-3: Llama with q, k, v in one matrix, gate and up in another, and one window for all blocks or none."""

from __future__ import annotations

from shortllama.families.family import FUSED_PROJECTIONS, Family

FAMILY = Family(
    model_type="phi3",
    sliding_window=True,
    # Phi3Attention splits its matrix by config.num_attention_heads (transformers 5.23).
    one_head_count=True,
    projections=FUSED_PROJECTIONS,
)
