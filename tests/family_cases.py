"""A tiny random model of every family, as stock transformers makes it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from shortllama import families

SIZES = {
    "vocab_size": 97,
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
HEADS = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 8, "intermediate_size": 48}
MIXED = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]


@dataclass(frozen=True)
class Case:
    """A family's tiny config, whether its widths can be pruned, and how far the stock class's logits may be off."""

    model_type: str
    fields: dict[str, Any] = field(default_factory=dict)
    widths: bool = True
    tolerance: float = 1e-5

    def config(self) -> dict[str, Any]:
        return {"model_type": self.model_type, **SIZES, **self.fields}


NEOX = {"num_attention_heads": 8, "intermediate_size": 96}
CASES = {
    "llama": Case("llama", HEADS),
    "llama tied": Case("llama", {**HEADS, "tie_word_embeddings": True}),
    "mistral": Case("mistral", {**HEADS, "sliding_window": 8}),
    "qwen2": Case("qwen2", {**HEADS, "layer_types": MIXED, "sliding_window": 8, "use_sliding_window": True}),
    "qwen3": Case("qwen3", HEADS),
    "gemma2": Case("gemma2", {**HEADS, "sliding_window": 8, "query_pre_attn_scalar": 8}),
    "gemma3": Case("gemma3_text", {**HEADS, "layer_types": MIXED, "sliding_window": 8, "query_pre_attn_scalar": 8}),
    "phi3": Case("phi3", HEADS),
    "gpt_neox": Case("gpt_neox", NEOX, widths=False),
    "gpt_neox sequential": Case(
        "gpt_neox", {**NEOX, "use_parallel_residual": False, "attention_bias": False}, widths=False
    ),
    "mamba": Case("mamba", {"state_size": 4}, widths=False),
    "mamba biases": Case(
        "mamba", {"state_size": 4, "use_bias": True, "use_conv_bias": False, "time_step_rank": 3}, widths=False
    ),
    "falcon_mamba": Case("falcon_mamba", {"state_size": 4}, widths=False),
    "mamba2": Case(
        "mamba2", {"state_size": 8, "num_heads": 8, "head_dim": 16, "n_groups": 2, "chunk_size": 8}, widths=False
    ),
    # The stock forward halves the hidden state after two blocks, and its norms add a constant to smaller variances.
    "rwkv": Case("rwkv", {"rescale_every": 2}, widths=False, tolerance=2e-4),
    "rwkv sizes": Case("rwkv", {"attention_hidden_size": 48, "intermediate_size": 80}, widths=False),
}


def stock_model(case: Case) -> Any:
    """The stock model with weights large enough that tokens differ."""
    fields = case.config()
    made = AutoConfig.for_model(fields.pop("model_type"), **fields)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(made).eval()
    family = families.lookup(case.model_type)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2 and "A_log" not in name:
            parameter.data.normal_(0, 0.3 if family.blocks in name else 0.15)
        elif family.norm_mark in name:
            parameter.data += torch.randn_like(parameter)
    return model
