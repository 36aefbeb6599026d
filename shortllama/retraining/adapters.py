"""LoRA by peft, put into a model in place and merged into its weights again. Every projection of every block.

peft's own wrapper class is not used: the model stays what it is for everything else in this package.
"""

from __future__ import annotations

from typing import Any

from shortllama.errors import UnsupportedError
from shortllama.families import adapter
from shortllama.retraining.recipes import Stage


def attach(model: Any, stage: Stage) -> None:
    """Give each projection its pair of matrices, in place: A random by torch's current seed, B zero, both float32.

    Everything else is frozen. The outputs are unchanged, as B is zero. Widths may differ from block to block, and
    blocks may lack a module. Raises UnsupportedError for a family whose blocks are not made of projections.
    """
    from peft import LoraConfig, inject_adapter_in_model

    parts = adapter(model)
    wanted = {linear for block in parts.blocks for linear in parts.projections(block).values()}
    names = [name for name, module in model.named_modules() if module in wanted]
    if not names:
        raise UnsupportedError(
            f"LoRA adapts projections, and blocks of {parts.family.model_type} are not made of them; use recipe cpt"
        )
    assert stage.rank is not None
    config = LoraConfig(
        r=stage.rank,
        lora_alpha=stage.alpha or stage.rank,
        lora_dropout=stage.dropout,
        target_modules=names,
        bias="none",
    )
    inject_adapter_in_model(config, model)


def merge(model: Any) -> None:
    """Add every pair of matrices to the weight that it adapts, and take it out, in place."""
    from peft.tuners.lora import LoraLayer

    for name, layer in [(n, module) for n, module in model.named_modules() if isinstance(module, LoraLayer)]:
        layer.merge(safe_merge=True)
        model.set_submodule(name, layer.get_base_layer())
    if hasattr(model, "peft_config"):
        del model.peft_config
