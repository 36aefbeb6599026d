"""What transformers calls the parts of each model family: one small file a family, one row of names and facts in it.

Everything that walks a model or a checkpoint goes through here, so that a family is added by one file and an unknown
one is refused by name. Torch is never imported: an Adapter only follows attribute names.
"""

from __future__ import annotations

from typing import Any

from shortllama.errors import UnsupportedError
from shortllama.families import gemma, gpt_neox, llama, mamba, mistral, phi3, qwen2, qwen3, rwkv
from shortllama.families.family import Adapter, Family

__all__ = ["FAMILIES", "Adapter", "Family", "adapter", "lookup"]

FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        llama.FAMILY,
        mistral.FAMILY,
        qwen2.FAMILY,
        qwen3.FAMILY,
        gemma.GEMMA2,
        gemma.GEMMA3,
        phi3.FAMILY,
        gpt_neox.FAMILY,
        mamba.MAMBA,
        mamba.FALCON_MAMBA,
        mamba.MAMBA2,
        rwkv.FAMILY,
    )
}

# Model types that are met often and are not supported, with the reason and, where there is one, the way out.
_REFUSED = {
    "gemma3": "it holds images too; save its language model alone, as gemma3_text",
    "gemma3n": "its blocks share KV caches, so that removing one breaks others",
}


def lookup(model_type: object) -> Family:
    """Return the family of a transformers model type. Raises UnsupportedError naming the supported ones."""
    family = FAMILIES.get(str(model_type))
    if family is None:
        why = f" ({_REFUSED[str(model_type)]})" if str(model_type) in _REFUSED else ""
        raise UnsupportedError(f"model type {model_type!r} is not supported{why}; supported: {', '.join(FAMILIES)}")
    return family


def check_steady(model: Any) -> None:
    """Raise UnsupportedError for a model whose forward changes its own weights, as its stock class may."""
    family = lookup(model.config.model_type)
    for name, value in family.steady.items():
        seen = getattr(model.config, name)
        if seen != value:
            raise UnsupportedError(
                f"{name} of this {family.model_type} model is {seen}: its forward rescales weights in place, so that "
                "they cannot be scored or sliced; load it with shortllama.load, which switches that off"
            )


def adapter(model: Any) -> Adapter:
    """Return the adapter of a transformers causal language model. Raises UnsupportedError for an unknown family."""
    family = lookup(getattr(getattr(model, "config", None), "model_type", type(model).__name__))
    if not hasattr(model, family.head):
        raise UnsupportedError(
            f"{type(model).__name__} has no {family.head}; expected a causal language model such as "
            f"{family.model_type.capitalize()}ForCausalLM"
        )
    return Adapter(family, model)
