"""Qwen2 and Qwen2.5: Llama with biases on q, k, v, and a window or none for each block (`layer_types`)."""

from __future__ import annotations

from shortllama.families.family import Family

FAMILY = Family(model_type="qwen2", biases=("q", "k", "v"), defaults={"num_key_value_heads": 32}, sliding_window=True)
