"""Which parameters of a block a weight-based criterion reads, and which it must not silently skip."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from shortllama.errors import UnsupportedError
from shortllama.families import Adapter


def scored_weights(adapter: Adapter, block: nn.Module) -> dict[str, nn.Parameter]:
    """Return the block's projection matrices and norm vectors by name; biases are left out, as published.

    Raises UnsupportedError for any other parameter (a router, experts, fused state), instead of a score without it.
    """
    family = adapter.family
    known = {*family.projections.values(), *family.attention_norms, *family.mlp_norms, *family.head_norms}
    found: dict[str, nn.Parameter] = {}
    for name, parameter in block.named_parameters():
        module, _, leaf = name.rpartition(".")
        if module not in known or leaf not in ("weight", "bias"):
            raise UnsupportedError(
                f"block parameter {name} is neither a projection nor a norm of a {family.model_type} block; "
                "use a forward criterion such as ppl or bi"
            )
        if leaf == "weight":
            found[name] = parameter
    return found


def per_group(columns: Tensor, groups: int) -> Tensor:
    """Return (K,) scores of KV groups from (H * d,) scores of the inputs of o_proj, which lie in query-head order.

    Query head j reads KV head j // (H/K), so the fold is (K, H/K, d); crediting head j to group j mod K would be
    wrong for every GQA model.
    """
    return columns.view(groups, -1).sum(dim=1) if groups else columns.new_zeros(0)


def floats(values: Tensor) -> tuple[float, ...]:
    """Return a 1-D tensor as Python floats."""
    return tuple(values.to(torch.float64).tolist())
