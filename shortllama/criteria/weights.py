"""Which parameters of a block a weight-based criterion reads, and how their values become one score."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor, nn

from shortllama.criteria import Reductions, Task
from shortllama.errors import UnsupportedError
from shortllama.families import Adapter
from shortllama.removals import Piece

# Values of a tensor looked at together on a CPU: few enough to stay in a cache, enough for calls to cost nothing.
PIECE = 1 << 16
# Into how many parts a tensor goes elsewhere, where calls cost more than a cache saves.
PARTS = 16


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


def by_piece(task: Task, block: int) -> dict[Piece, dict[str, nn.Parameter]]:
    """Return the scored weights of the task's pieces in a block, by name; each module has its norms.

    Modules that are not there (any more) are left out.
    """
    family, size = task.adapter.family, task.shape.blocks[block]
    present = {"attention": size.kv_heads > 0, "mlp": size.neurons > 0}
    found: dict[Piece, dict[str, nn.Parameter]] = {}
    for name, weight in scored_weights(task.adapter, task.stack.blocks[block]).items():
        inside = name.startswith(f"{family.attention}.") or name.rpartition(".")[0] in family.attention_norms
        part = "attention" if inside else "mlp"
        if present[part]:
            found.setdefault(Piece(block, "block" if task.unit == "block" else part), {})[name] = weight
    return found


def rows(of: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """Return, in float64, the values of `of(*tensors)` summed for each output neuron of a matrix (O, I), as (O,).

    Of a norm (D,), its values. `of` works value by value, and is given a few rows of all tensors at a time.
    """
    values = (of(*part) for part in pieces(*tensors))
    return torch.cat([one.double() if one.dim() == 1 else one.sum(dim=1, dtype=torch.float64) for one in values])


def columns(of: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """Return, in float64, the values of `of(*tensors)` summed for each input of a matrix, (I,). See `rows`."""
    total = torch.zeros(tensors[0].shape[1], dtype=torch.float64, device=tensors[0].device)
    for part in pieces(*tensors):
        total += of(*part).sum(dim=0, dtype=torch.float64)
    return total


def pieces(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Yield the same rows of all tensors, few at a time: what is made of them needs no memory worth naming."""
    first = tensors[0]
    values = PIECE if first.device.type == "cpu" else max(PIECE, first.numel() // PARTS)
    count = max(1, values * len(first) // max(1, first.numel()))
    return zip(*(tensor.split(count) for tensor in tensors), strict=True)


def aggregate(tensors: Mapping[str, Tensor], how: Reductions) -> float:
    """Return one score: the values (O,) of each tensor reduced over output neurons, then over the tensors.

    Published: sum and sum. With a product anywhere the natural logarithm of the score is returned instead, which ranks
    alike: the product over thousands of output neurons leaves every floating-point range.
    """
    logarithmic = "prod" in (how.weight, how.block)
    values = [tensor.log() if logarithmic else tensor for tensor in tensors.values()]
    reduce = _reduce_logarithms if logarithmic else _reduce
    return reduce(torch.stack([reduce(value, how.weight) for value in values]), how.block).item()


def _reduce(values: Tensor, how: str) -> Tensor:
    return {"sum": values.sum, "mean": values.mean, "max": values.max}[how]()


def _reduce_logarithms(values: Tensor, how: str) -> Tensor:
    """Return the logarithm of the reduction of exp(values)."""
    if how == "prod":
        return values.sum()
    return values.max() if how == "max" else values.logsumexp(0) - (math.log(len(values)) if how == "mean" else 0)


def per_group(columns: Tensor, groups: int) -> Tensor:
    """Return (K,) scores of KV groups from (H * d,) scores of the inputs of o_proj, which lie in query-head order.

    Query head j reads KV head j // (H/K), so the fold is (K, H/K, d); crediting head j to group j mod K would be
    wrong for every GQA model. With H for `groups`, the scores of the query heads.
    """
    return columns.view(groups, -1).sum(dim=1) if groups else columns.new_zeros(0)


def floats(values: Tensor) -> tuple[float, ...]:
    """Return a 1-D tensor as Python floats."""
    return tuple(values.to(torch.float64).tolist())
