"""Facts that a transformers `config.json` states in more than one way: its family, its windows, absent fields. Pure."""

from __future__ import annotations

from typing import Any

from shortllama.errors import UnsupportedError
from shortllama.families import FAMILIES, Family, lookup

# Our own form for what no stock class can express (non-uniform widths, missing modules): the base's config, and the
# blocks' sizes. Loading it with stock transformers fails by model type, loudly.
OWN_MODEL_TYPE = "shortllama"

# In a stock-loadable config whose model type is not the family of its weights (a Llama of 26 heads saved as mistral):
# the family. Our loader builds that family's class, so that a pruned model and its base run the same code.
FAMILY_KEY = "shortllama_family"

# In such a config: the biases, where the model type groups them otherwise than the family does.
BIASES_KEY = "shortllama_biases"

# Config fields that count experts.
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")

# By whether a block attends to everything before it.
_KINDS = ("sliding_attention", "full_attention")

Config = dict[str, Any]


def family_of(config: Config) -> Family:
    """Return the family whose modules a config.json describes. Raises UnsupportedError for an unknown one."""
    if config.get("model_type") == OWN_MODEL_TYPE:
        return family_of(config.get("base", {}))
    if config.get("quantization_config"):
        method = dict(config["quantization_config"]).get("quant_method", "unknown")
        raise UnsupportedError(
            f"config.json: weights quantized by {method!r} cannot be pruned; start from an unquantized checkpoint"
        )
    _refuse_parts(config)
    return lookup(config.get(FAMILY_KEY, config.get("model_type")))


def _refuse_parts(config: Config) -> None:
    """Raise UnsupportedError for what no family of ours has, whatever the model type: experts, shared KV caches."""
    experts = next((name for name in _EXPERTS if int(config.get(name) or 0) > 1), None)
    if experts is not None:
        raise UnsupportedError(
            f"config.json of a {config.get('model_type')} model: {experts} is {config[experts]}; mixtures of experts "
            "are not supported, scores of their experts would be wrong"
        )
    if config.get("num_kv_shared_layers"):
        raise UnsupportedError(
            f"config.json of a {config.get('model_type')} model: num_kv_shared_layers is "
            f"{config['num_kv_shared_layers']}; blocks that share KV caches cannot be removed one by one"
        )


def layer_types(config: Config) -> list[str] | None:
    """Return each block's kind of attention where a family has more than one, else None.

    Gemma's files may leave the list out: every second (Gemma 2) or sixth block has full attention.
    Old Qwen2 files leave the list out: blocks from `max_window_layers` on have the window, if it is used at all
    (transformers' own rule, Qwen2Config.__post_init__).
    """
    if config.get("layer_types") is not None:
        return list(config["layer_types"])
    family = FAMILIES.get(str(config.get(FAMILY_KEY, config.get("model_type"))))
    if family is not None and family.pattern is not None:
        every = int(config.get("sliding_window_pattern") or family.pattern)
        return [_KINDS[(i + 1) % every == 0] for i in range(int(config["num_hidden_layers"]))]
    if not config.get("use_sliding_window"):
        return None
    first = int(config.get("max_window_layers", 28))
    return [_KINDS[i < first] for i in range(int(config["num_hidden_layers"]))]


def has_window(config: Config) -> bool:
    """Whether any block of a model attends to less than everything before it."""
    kinds = layer_types(config)
    if kinds is not None:
        return any(kind != "full_attention" for kind in kinds)
    family = family_of(config)
    return family.model_type == "mistral" and bool(field_of(config, family, "sliding_window"))


def field_of(config: Config, family: Family, name: str) -> Any:
    """Return a field as the stock config class would see it: absent fields have the class's default."""
    return config.get(name, family.defaults.get(name))
