"""Mistral: Llama without biases, with one sliding window for all blocks or none."""

from __future__ import annotations

from shortllama.families.family import Family

FAMILY = Family(model_type="mistral", defaults={"num_key_value_heads": 8, "sliding_window": 4096}, sliding_window=True)
